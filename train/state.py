"""What a run needs to go on: weights, moments and averages, by parameter, in the slices that each rank owns.

Every engine shards the parameters in its own way, but a shard is always a slice of a flattened parameter. Written down
as (name, start, numbers), one engine's state is every engine's: on as many ranks, on others, under another ZeRO stage.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs import storage
from configs.errors import UserError
from configs.foreign import parse_object, reading
from model.weights import LazyWeights, open_weights, read_weights

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
STARTS, STEP, CHECKSUMS = "starts", "step", "crc32"  # in a file's metadata


@dataclass(frozen=True, eq=False)
class ParamShard:
    """A slice of one parameter that this rank optimises, as views: what is written into them is restored."""

    name: str
    start: int  # in the flattened parameter
    weight: Tensor  # (n) float32
    owner: Tensor  # the optimizer's own tensor that holds it: the key of its state
    offset: int  # of the slice in the flattened local part of `owner`

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """(n) of the optimizer's state."""
        whole = optimizer.state[self.owner][key]
        return local_part(whole).view(-1)[self.offset : self.offset + len(self.weight)]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that FSDP2 may have sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def collect_state(
    shards: Iterable[ParamShard],
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of this rank's file; `averages` (n) by the shards' names, `buffers` whole."""
    tensors: dict[str, Tensor] = {}
    starts = {shard.name: shard.start for shard in shards if len(shard.weight)} | dict.fromkeys(buffers, 0)
    for shard in shards:
        if not len(shard.weight):  # fewer rows than ranks
            continue
        tensors[f"weight/{shard.name}"] = shard.weight
        tensors[f"ema/{shard.name}"] = averages[shard.name]
        if shard.owner in optimizer.state:
            tensors |= {f"{key}/{shard.name}": shard.moment(optimizer, key) for key in MOMENTS}
    for name, buffer in buffers.items():
        tensors |= {f"{kind}/{name}": buffer.detach().float().flatten() for kind in ("weight", "ema")}
    steps = {int(state["step"]) for state in optimizer.state.values()}  # the exponent of Adam's bias correction
    assert len(steps) <= 1, steps
    return tensors, {STARTS: json.dumps(starts), STEP: str(max(steps, default=0))}


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata by which altered numbers are found."""
    return {CHECKSUMS: json.dumps({name: _crc32(tensor) for name, tensor in tensors.items()})}


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class SavedState:
    """The files of all ranks together, on disk or in a bucket; numbers are read when they are asked for.

    From a bucket each tensor is a request of its own; with `copies`, a file is copied to this machine when something of
    it is asked for, and stays until `copies` is closed.
    """

    def __init__(self, paths: Iterable[str | Path], copies: ExitStack | None = None) -> None:
        """Raises UserError for files that are no complete state."""
        self.slices: dict[str, list[tuple[int, LazyWeights]]] = {}  # by tensor: where each begins, and its file
        self.steps, self.paths = 0, list(paths)
        for path in self.paths:
            file = read_weights(path, partial(storage.open, buffer_bytes=1))
            if STARTS not in file.metadata:
                raise UserError(f"{path} holds weights, but no state of a training run")
            with reading(path):
                starts = _starts(file, path)
                self.steps = max(self.steps, int(file.metadata[STEP]))
            if copies is not None and storage.is_s3(path):
                file = replace(file, read=_reading_copy(path, copies))
            checked = _checked(file, path)
            for key in file:
                self.slices.setdefault(key, []).append((starts[key], checked))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """(length) float32 of `weight`, `ema` or a moment of the flattened parameter `name`."""
        key, numbers, filled = f"{kind}/{name}", torch.empty(length), 0
        for begin, file in sorted(self.slices.get(key, ()), key=lambda item: item[0]):
            end = begin + len(file.specs[key])
            low, high = max(start, begin), min(start + length, end)
            if low < high and low == start + filled:  # neither a gap nor an overlap
                numbers[low - start : high - start] = file[key][low - begin : high - begin]
                filled += high - low
        if filled != length:
            where = storage.parent(self.paths[0]) if self.paths else "no file"
            raise UserError(f"{where} holds {filled} of {length} numbers of {key}: it is of another model, or damaged")
        return numbers

    def whole(self, kind: str, specs: Mapping[str, Tensor]) -> LazyWeights:
        """All tensors of `specs` (shapes by name, on the meta device), each put together when it is asked for."""
        wanted = {name: torch.empty(spec.shape, device="meta") for name, spec in specs.items()}  # float32

        def read(name: str) -> Tensor:
            return self.read(kind, name, 0, wanted[name].numel()).reshape(wanted[name].shape)

        return LazyWeights(wanted, read)

    @torch.no_grad()
    def restore(self, shards: Iterable[ParamShard], optimizer: torch.optim.Optimizer) -> None:
        """Writes weights and moments into the shards' views; the optimizer goes on counting from the saved step."""
        for shard in shards:
            if self.steps and shard.owner not in optimizer.state:
                state = optimizer.state[shard.owner]
                state["step"] = torch.tensor(float(self.steps), device=shard.weight.device)
                state |= {key: torch.zeros_like(shard.owner) for key in MOMENTS}
            span = (shard.name, shard.start, len(shard.weight))
            shard.weight.copy_(self.read("weight", *span))
            for key in MOMENTS if self.steps else ():
                shard.moment(optimizer, key).copy_(self.read(key, *span))


def _starts(file: LazyWeights, path: str | Path) -> dict[str, int]:
    """Where each tensor of a rank's file begins in the flattened parameter."""
    starts = parse_object(file.metadata[STARTS], path)
    by_key = {key: starts[key.partition("/")[2]] for key in file}
    for key, start in by_key.items():
        if type(start) is not int or start < 0 or file.specs[key].ndim != 1 or file.specs[key].dtype != torch.float32:
            raise UserError(f"{key} is no slice of float32 numbers")
    return by_key


def _reading_copy(path: str | Path, copies: ExitStack) -> Callable[[str], Tensor]:
    copied: list[LazyWeights] = []

    def read(name: str) -> Tensor:
        if not copied:
            copied.append(open_weights(copies.enter_context(storage.cached_file(path))))
        return copied[0].read(name)

    return read


def _checked(file: LazyWeights, path: str | Path) -> LazyWeights:
    """The tensors of a rank's file; reading one whose numbers have changed since they were written is a UserError."""
    expected = parse_object(file.metadata.get(CHECKSUMS, "{}"), path)

    def read(name: str) -> Tensor:
        tensor = file.read(name)
        crc32 = _crc32(tensor)
        if expected.get(name, crc32) != crc32:
            raise UserError(f"{path} is damaged in {name}; delete its checkpoint to resume from the one before it")
        return tensor

    return replace(file, read=read)
