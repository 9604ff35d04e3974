"""What lives in memory while code runs on tensors without data: every storage, its size, and what it is for."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
EMPTY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
EXCHANGES = ("c10d", "_c10d_functional", "fsdp")  # namespaces of operations between ranks
ZERO = {True: 0.0, False: 0}  # what a tensor without data says when it is asked for its number
EXCHANGED = "exchanged"  # the tag of what they read and write, unless it has a name


@dataclass
class Entry:
    """One storage."""

    born: int  # in operations since the ledger was opened
    tag: str
    held: int  # bytes
    lazy: bool  # it takes memory as it is written to
    named: bool = False


@dataclass
class Peak:
    """The moment at which most was held."""

    at: int = 0  # in operations since the ledger was opened
    held: Counter[str] = field(default_factory=Counter)  # bytes by tag

    @property
    def total(self) -> int:
        return sum(self.held.values())


class Ledger(TorchDispatchMode):
    """Within the block, the bytes of all storages that operations make, by tag. For use under FakeTensorMode.

    With `lazy`, what is allocated and not yet written to does not count: on a CPU such pages take no memory.
    """

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        self.lazy, self.tag, self.operations = lazy, "other", 0
        self.entries: dict[int, Entry] = {}
        self.held: Counter[str] = Counter()
        self.peak = Peak()
        self._storage_resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Ledger":
        ledger, resize = self, self._storage_resize

        def recorded(self: torch.UntypedStorage, size: int) -> Any:
            resize(self, size)
            if entry := ledger.entries.get(self._cdata):
                ledger._hold(entry, size)
            return self

        torch.UntypedStorage.resize_ = recorded  # FSDP2 empties and refills gathered weights so: no operation tells
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._storage_resize
        super().__exit__(*raised)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return ZERO[args[0].dtype.is_floating_point]
        out = func(*args, **kwargs)
        self.operations += 1
        lazy = self.lazy and func.overloadpacket in EMPTY
        for tensor in local_tensors(out):
            self._see(tensor, lazy)
        if func.namespace in EXCHANGES:
            for tensor in local_tensors((args, kwargs, out)):
                self._write(tensor)
                self._rename(self._entry(tensor), EXCHANGED, named=False)
        else:
            for tensor in local_tensors(written(func, args, kwargs)):
                self._write(tensor)
        if sum(self.held.values()) > self.peak.total:
            self.peak = Peak(self.operations, self.held.copy())
        return out

    def restart(self) -> Peak:
        """The peak so far; a new one begins with what is there now."""
        last, self.peak = self.peak, Peak(self.operations, self.held.copy())
        return last

    def name(self, tensors: Iterable[Tensor], tag: str) -> None:
        """Says what these tensors are for, in the present and in the peak."""
        for tensor in local_tensors(list(tensors)):
            self._see(tensor, lazy=False)
            self._rename(self._entry(tensor), tag, named=True)

    def name_living(self, old: str, new: str) -> None:
        """What is still there of `old` was for `new`."""
        for entry in self.entries.values():
            if entry.tag == old:
                self._rename(entry, new, named=True)

    def _entry(self, tensor: Tensor) -> Entry:
        return self.entries[tensor.untyped_storage()._cdata]

    def _see(self, tensor: Tensor, lazy: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.entries:
            return
        entry = self.entries[storage._cdata] = Entry(self.operations, self.tag, 0, lazy)
        if not lazy:
            self._hold(entry, storage.nbytes())
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _write(self, tensor: Tensor) -> None:
        self._see(tensor, lazy=False)
        entry = self._entry(tensor)
        if entry.lazy and tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = (tensor.storage_offset() + last + 1) * tensor.element_size()
            self._hold(entry, max(entry.held, int(end)))

    def _hold(self, entry: Entry, size: int) -> None:
        self.held[entry.tag] += size - entry.held
        entry.held = size

    def _rename(self, entry: Entry, tag: str, named: bool) -> None:
        if entry.named and not named:
            return
        for held in (self.held, self.peak.held) if entry.born <= self.peak.at else (self.held,):
            held[entry.tag] -= entry.held
            held[tag] += entry.held
        entry.tag, entry.named = tag, named

    def _forget(self, key: int) -> None:
        entry = self.entries.pop(key)
        self.held[entry.tag] -= entry.held


def local_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tree that have memory: those inside of FSDP2's, not the wrappers."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            if is_traceable_wrapper_subclass(leaf):
                inner, _ = leaf.__tensor_flatten__()
                yield from local_tensors([getattr(leaf, name) for name in inner])
            elif leaf.device.type != "meta":  # as DeepSpeed makes to remember shapes
                yield leaf


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operation writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(kwargs[argument.name] if argument.name in kwargs else args[i] if i < len(args) else None)
    return found
