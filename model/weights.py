"""safetensors files, read and written one tensor at a time; a file is written whole or not at all."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.untrusted import parse_object, reading, require_inside
from model.bare_names import bare_names

HEADER_BYTES = 100_000_000  # the format's own limit
INDEX_SUFFIX = ".index.json"  # of the file that says which shard holds which tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class LazyWeights(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for; `specs` have their shapes and dtypes without data."""

    specs: Mapping[str, Tensor]  # on the meta device
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file
    where: str = "these weights"  # the file, for errors
    prefix: str = ""  # that all names had in the file, see `bare_weights`

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def renamed(self, names: Mapping[str, str]) -> "LazyWeights":
        """The tensors of `names`, each under `names[name]`."""
        old = {new: name for name, new in names.items()}
        twice = [new for name, new in names.items() if old[new] != name]
        if twice:
            raise UserError(f"two tensors of {self.where} would be called {_some(twice)}")
        specs = {new: self.specs[name] for new, name in old.items()}
        return replace(self, specs=specs, read=lambda new: self.read(old[new]))

    def cast(self, dtype: torch.dtype) -> "LazyWeights":
        """The same tensors in `dtype`."""
        specs = {name: spec.to(dtype) for name, spec in self.specs.items()}
        return replace(self, specs=specs, read=lambda name: self.read(name).to(dtype))


def lazily(state: Mapping[str, Tensor]) -> LazyWeights:
    """A dict of tensors as LazyWeights; LazyWeights as they are."""
    if isinstance(state, LazyWeights):
        return state
    return LazyWeights({name: tensor.detach().to("meta") for name, tensor in state.items()}, state.__getitem__)


def save_weights(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the tensors to the safetensors file `path` atomically, one after the other."""
    specs = lazily(state).specs
    order = sorted(specs, key=lambda name: (-specs[name].element_size(), name))  # widest first: all stay aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        start, end = end, end + specs[name].nbytes
        shape = list(specs[name].shape)
        header[name] = {"dtype": DTYPE_NAMES[specs[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with storage.writing(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(state[name].detach().cpu().contiguous()))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    return dict(open_weights(path))


def open_weights(path: str | Path) -> LazyWeights:
    """The tensors of a safetensors file, or of the shards that an `*.index.json` names."""
    path = storage.local(path)
    if not path.is_file():
        raise MissingFileError(f"no weights file {path}")
    return _open_shards(path) if path.name.endswith(INDEX_SUFFIX) else read_weights(path)


def read_weights(path: str | Path) -> LazyWeights:
    """The tensors of one safetensors file; of an s3:// url each is a request of its own."""
    incomplete = UserError(f"{path} is no complete safetensors file; copy, download or write it again")
    with storage.open(path, buffer_bytes=1) as file, reading(path):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        end = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < end <= min(size, 8 + HEADER_BYTES):
            raise incomplete
        header = parse_object(file.read(end - 8), path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise UserError("__metadata__ must hold strings")
        specs = {name: _spec(name, entry) for name, entry in header.items()}
        begin, offsets = end, dict[str, int]()
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            offsets[name], end = end, end + specs[name].nbytes
            if entry["data_offsets"] != [offsets[name] - begin, end - begin]:
                raise UserError(f"a gap, an overlap or a wrong size at {_some([name])}")
        if end != size:
            raise incomplete

    def read(name: str) -> Tensor:
        # Straight into the tensor's own memory: pages of a memory map would count until the whole file is closed.
        tensor = torch.empty(specs[name].shape, dtype=specs[name].dtype, device="cpu")
        with storage.open(path, buffer_bytes=1) as file:
            file.seek(offsets[name])
            if file.readinto(_bytes(tensor)) != tensor.nbytes:
                raise UserError(f"{path} ends within {name}; it changed while it was read")
        return tensor

    return LazyWeights(specs, read, metadata, str(path))


def _spec(name: str, entry: dict[str, Any]) -> Tensor:
    """The tensor of a header's untrusted `entry`, without data; of what is no entry, any error that `reading` knows."""
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, *offsets)):
        raise UserError(f"{_some([name])} has sizes or offsets that are no numbers of bytes")
    if math.prod(max(size, 1) for size in shape) >= 1 << 59 or len(shape) > 64:  # torch cannot count the bytes
        raise UserError(f"{_some([name])} has the shape {str(shape)[:80]}")
    return torch.empty(shape, dtype=dtype, device="meta")


def _open_shards(index: Path) -> LazyWeights:
    with reading(index):
        files = dict[str, str](parse_object(index.read_bytes(), index)["weight_map"])
        # As text: links from there to where files are kept are the user's own, as in Hugging Face's cache.
        shards = {file: index.parent / require_inside(file, index) for file in files.values()}
    opened = {file: read_weights(path) for file, path in shards.items()}
    stored = {(name, file) for file, shard in opened.items() for name in shard}
    differing = sorted({name for name, _ in stored ^ set(files.items())})
    if differing or not files:
        raise UserError(f"{index} does not say what is in its shards: {_some(differing)}")
    specs = {name: opened[file].specs[name] for name, file in files.items()}
    return LazyWeights(specs, lambda name: opened[files[name]].read(name), where=str(index))


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies the weights of `state` (see `bare_weights`), which must be exactly the module's, into the module.

    A module on the meta device gets its memory here, tensor by tensor, in the dtypes of `state`.
    """
    own, given = module.state_dict(), bare_weights(state)
    require_same_tensors(own, given.specs, f"{given.where}: not the weights of this {type(module).__name__}")
    if any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict({name: given[name] for name in own}, assign=True)
        return
    for name, tensor in own.items():
        tensor.copy_(given[name])  # detached, sharing the parameter's memory


def bare_weights(state: Mapping[str, Tensor]) -> LazyWeights:
    """The model's weights in `state` under their bare names (see `bare_names`). Reading NaN or infinity is a
    UserError."""
    given = lazily(state)
    names, prefix = bare_names(given.specs, given.where)
    bare = given.renamed(names)

    def read(name: str) -> Tensor:
        tensor = bare.read(name)
        # torch cannot tell it of numbers of 8 bits.
        if not torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all():
            raise UserError(f"{given.where} holds NaN or infinity in {_some([name])}; it plays nothing but noise")
        return tensor

    return replace(bare, read=read, prefix=prefix)


def require_same_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """A UserError that begins with `what` and lists what is missing, unexpected, misshapen or mistyped in `given`."""
    shared = [(name, given[name], spec) for name, spec in expected.items() if name in given]
    faults = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "misshapen": [f"{name} {tuple(a.shape)} for {tuple(b.shape)}" for name, a, b in shared if a.shape != b.shape],
        "mistyped": [
            f"{name} {a.dtype} for {b.dtype}" for name, a, b in shared if a.is_floating_point() != b.is_floating_point()
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{what}: {listed}")


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _some(names: list[str], limit: int = 3) -> str:
    shown = (" ".join(name.split())[:80] for name in names[:limit])
    return ", ".join(shown) + (", ..." if len(names) > limit else "")
