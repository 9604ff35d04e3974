"""Weights in and out: safetensors files that appear whole or not at all, read and written one tensor at a time."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.files import atomic_path
from configs.foreign import parse_json, parse_object, reading, require_inside
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
    """Tensors by name, each made when it is asked for and kept by nobody; `specs` are their twins without data."""

    specs: Mapping[str, Tensor]  # on the meta device: shape and dtype
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file, words without a meaning for the tensors
    where: str = "these weights"  # the file, for errors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def renamed(self, names: Mapping[str, str]) -> "LazyWeights":
        """The tensors of `names`, each under `names[name]`. Raises ValueError if two would have one name."""
        old = {new: name for name, new in names.items()}
        if len(old) != len(names):
            twice = [new for name, new in names.items() if old[new] != name]
            raise UserError(f"two tensors of {self.where} would be called {_some(twice)}")
        specs = {new: self.specs[name] for new, name in old.items()}
        return replace(self, specs=specs, read=lambda new: self.read(old[new]))

    def cast(self, dtype: torch.dtype) -> "LazyWeights":
        """The same tensors in `dtype`."""
        specs = {name: spec.to(dtype) for name, spec in self.specs.items()}
        return replace(self, specs=specs, read=lambda name: self.read(name).to(dtype))


def lazily(state: Mapping[str, Tensor]) -> LazyWeights:
    """A dict of tensors in the form of those on disk; LazyWeights as they are."""
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
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(state[name].detach().cpu().contiguous()))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises ValueError in one line for a file that is none."""
    return dict(open_weights(path))


def read_weights(where: str | Path, opened: Callable[[str | Path], BufferedReader]) -> LazyWeights:
    """As open_weights of the safetensors file `where`, which `opened` opens for every read, wherever it lies."""
    return _open_file(where, opened)


def open_weights(path: str | Path) -> LazyWeights:
    """The tensors of a safetensors file or of the shards that an `*.index.json` names, each read when asked for.

    Raises in one line: no such file, a truncated one, shards that are not what their index says.
    """
    path = storage.local(path)
    if not path.is_file():
        raise MissingFileError(f"no weights file {path}")
    return _open_shards(path) if path.name.endswith(INDEX_SUFFIX) else _open_file(path)


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies the model's weights in `state` (see `bare_names`) into the module's parameters and buffers; every one must
    be there, with its shape.

    A module on the meta device gets its memory here, tensor by tensor, in the dtypes of `state`. Raises ValueError in
    one line otherwise.
    """
    own, given = module.state_dict(), bare_weights(state)
    require_same_tensors(own, given.specs, f"{given.where}: not the weights of this {type(module).__name__}")
    if any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict({name: given[name] for name in own}, assign=True)
        return
    for name, tensor in own.items():
        tensor.copy_(given[name])  # detached, sharing the parameter's memory


def bare_weights(state: Mapping[str, Tensor]) -> LazyWeights:
    """The model's weights in `state` under their own names (see `bare_names`); what those were is said on stderr."""
    given = lazily(state)
    found = bare_names(given.specs)
    found.say(given.where)
    return given.renamed(found.names)


def finite(state: LazyWeights) -> LazyWeights:
    """`state`, of which reading a tensor that holds NaN or infinity raises a ValueError that names the file."""

    def read(name: str) -> Tensor:
        tensor = state.read(name)
        numbers = tensor if tensor.element_size() > 1 else tensor.float()  # of 8 bits: torch does not tell
        if not torch.isfinite(numbers).all():
            raise UserError(f"{state.where} holds NaN or infinity in {_some([name])}; it plays nothing but noise")
        return tensor

    return replace(state, read=read)


def require_same_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError that begins with `what` and says what is missing, unexpected or misshapen in `given`."""
    misshapen = [
        f"{name} {tuple(given[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    mistyped = [
        f"{name} {given[name].dtype} for {expected[name].dtype}"
        for name in expected
        if name in given and given[name].is_floating_point() != expected[name].is_floating_point()
    ]
    faults = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "misshapen": misshapen,
        "mistyped": mistyped,
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{what}: {found}")


def _opened(path: str | Path) -> BufferedReader:
    return open(path, "rb")


def _open_file(path: str | Path, opened: Callable[[str | Path], BufferedReader] = _opened) -> LazyWeights:
    with opened(path) as file, reading(path):
        begin, size, header = _read_header(path, file)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(word, str) for word in metadata.values()):
            raise UserError("__metadata__ holds more than words")
        spans = {name: _span(name, entry) for name, entry in header.items()}
        end = 0
        for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
            if start != end:
                raise UserError(f"tensors overlap, or leave a hole, at {_some([name])}")
            end = stop
        if begin + end != size:
            raise UserError(f"{path} is no complete safetensors file: {size} bytes, where it tells of {begin + end}")
        specs = {
            name: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            for name, entry in header.items()
        }

    def read(name: str) -> Tensor:
        # Straight into the tensor's own memory: pages of a memory map would count until the whole file is closed.
        tensor = torch.empty(specs[name].shape, dtype=specs[name].dtype, device="cpu")
        with opened(path) as file:
            file.seek(begin + spans[name][0])
            if file.readinto(_bytes(tensor)) != tensor.nbytes:
                raise UserError(f"{path} ends within {name}; it changed while it was read")
        return tensor

    return LazyWeights(specs, read, metadata, str(path))


def _read_header(path: str | Path, file: BufferedReader) -> tuple[int, int, dict[str, Any]]:
    """Where the tensors begin in a safetensors file, where they end, and what its header says."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = 8 + int.from_bytes(file.read(8), "little")
    if not 8 < begin <= min(size, 8 + HEADER_BYTES):
        raise UserError(f"{path} is no complete safetensors file: its header cannot be read")
    return begin, size, parse_object(file.read(begin - 8), path)


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends. Raises ValueError unless `entry` tells that, a dtype and a shape that fit."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{_some([name])} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{_some([name])} is of type {str(dtype)[:80]}; known are: {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(one) is int and 0 <= one < 1 << 62 for one in numbers):
            raise UserError(f"{_some([name])} has the shape {str(shape)[:80]} at {str(offsets)[:80]}")
    if math.prod(max(one, 1) for one in shape) >= 1 << 59 or len(shape) > 64:  # whose bytes torch cannot count
        raise UserError(f"{_some([name])} has the shape {str(shape)[:80]}")
    bytes_told = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != bytes_told:
        raise UserError(f"{_some([name])} has {bytes_told} bytes by its shape, and others at {str(offsets)[:80]}")
    return offsets[0], offsets[1]


def _open_shards(index: Path) -> LazyWeights:
    with reading(index):
        told = parse_json(index.read_bytes(), index)
        files = told.get("weight_map") if isinstance(told, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"{index} is no index of shards: a `weight_map` of names to files is needed")
        # As text: links from there to where files are kept are the user's own, as in Hugging Face's cache.
        named = {name: require_inside(file, index) for name, file in files.items()}
    missing = sorted({file for file in named.values() if not (index.parent / file).is_file()})
    if missing or not named:
        raise MissingFileError(f"{index} names {len(set(named.values()))} shards; not there: {_some(missing)}")
    shards = {file: _open_file(index.parent / file) for file in dict.fromkeys(named.values())}
    held = {name: file for file, shard in shards.items() for name in shard}
    if held != named or sum(map(len, shards.values())) != len(named):
        differing = sorted(name for name in held.keys() | named.keys() if held.get(name) != named.get(name))
        raise UserError(f"{index} does not say what is in its shards: {_some(differing) or 'a tensor is there twice'}")
    specs = {name: shards[file].specs[name] for name, file in named.items()}
    return LazyWeights(specs, lambda name: shards[named[name]].read(name), where=str(index))


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _some(names: list[str], limit: int = 3) -> str:
    shown = (" ".join(name.split())[:80] for name in names[:limit])
    return ", ".join(shown) + (", ..." if len(names) > limit else "")
