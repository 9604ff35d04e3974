"""What a run needs to go on: weights, moments and averages, by parameter, in the slices that each rank owns.

Every engine shards the parameters in its own way, but a shard is always a slice of a flattened parameter. Written down
as (name, start, numbers), one engine's state is every engine's: on as many ranks, on others, under another ZeRO stage.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs import storage
from configs.errors import UserError
from configs.untrusted import parse_object, reading
from model.weights import LazyWeights, open_weights, read_weights

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
MOMENTUM = "momentum_buffer"  # of Muon
STARTS, STEP, CHECKSUMS = "starts", "step", "crc32"  # in a file's metadata


@dataclass(frozen=True, eq=False)
class ParamShard:
    """A slice of one parameter that this rank optimises, as views: what is written into them is restored."""

    name: str
    start: int  # in the flattened parameter
    weight: Tensor  # (n) float32
    owner: Tensor  # the optimizer's own tensor that holds it: the key of its state
    offset: int  # of the slice in the flattened local part of `owner`

    def of(self, whole: Tensor) -> Tensor:
        """(n) of `owner`, or of a tensor of its kind."""
        return local_part(whole).view(-1)[self.offset : self.offset + len(self.weight)]

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """(n) of the optimizer's state."""
        return self.of(optimizer.state[self.owner][key])

    def moments(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Keys of the optimizer's state for the slice: none before AdamW's first step."""
        return [key for key in (*MOMENTS, MOMENTUM) if key in optimizer.state.get(self.owner, ())]


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
    shards = [shard for shard in shards if len(shard.weight)]  # none of a parameter with fewer rows than ranks
    starts = {shard.name: shard.start for shard in shards} | dict.fromkeys(buffers, 0)
    for shard in shards:
        tensors[f"weight/{shard.name}"] = shard.weight
        tensors[f"ema/{shard.name}"] = averages[shard.name]
        tensors |= {f"{key}/{shard.name}": shard.moment(optimizer, key) for key in shard.moments(optimizer)}
    for name, buffer in buffers.items():
        tensors |= {f"{kind}/{name}": buffer.detach().float().flatten() for kind in ("weight", "ema")}
    # The exponent of AdamW's bias correction; Muon has none.
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, steps
    return tensors, {STARTS: json.dumps(starts), STEP: str(max(steps, default=0))}


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata by which altered numbers are found."""
    return {CHECKSUMS: json.dumps({name: _crc32(tensor) for name, tensor in tensors.items()})}


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class RankFile:
    """What one rank has written, on disk or in a bucket. From a bucket each tensor is a request of its own; with `copy`
    the file is copied to this machine when something of it is asked for."""

    def __init__(self, path: str | Path, copy: bool) -> None:
        """Raises UserError for a file that holds no state."""
        self.path, self.copy = path, copy
        self.file = read_weights(path)
        if STARTS not in self.file.metadata:
            raise UserError(f"{path} holds weights, but no state of a training run")
        with reading(path):
            starts = parse_object(self.file.metadata[STARTS], path)
            self.starts = {key: starts[key.partition("/")[2]] for key in self.file}  # in the flattened parameters
            self.steps = int(self.file.metadata[STEP])
            self.crc32 = parse_object(self.file.metadata.get(CHECKSUMS, "{}"), path)
            for key, start in self.starts.items():
                spec = self.file.specs[key]
                if type(start) is not int or start < 0 or spec.ndim != 1 or spec.dtype != torch.float32:
                    raise UserError(f"{key} is no slice of float32 numbers")

    @cached_property
    def _source(self) -> LazyWeights:
        return open_weights(self.path) if self.copy else self.file

    def read(self, key: str) -> Tensor:
        """Raises UserError if the numbers have changed since they were written."""
        tensor = self._source.read(key)
        crc32 = _crc32(tensor)
        if self.crc32.get(key, crc32) != crc32:
            raise UserError(f"{self.path} is damaged in {key}; delete its checkpoint to resume from the one before it")
        return tensor


class SavedState:
    """The files of all ranks together; numbers are read when they are asked for."""

    def __init__(self, paths: Iterable[str | Path], copy: bool = False) -> None:
        """`copy` as of RankFile. Raises UserError for files that are no complete state."""
        self.files = [RankFile(path, copy) for path in paths]
        self.steps = max((file.steps for file in self.files), default=0)
        self.slices: dict[str, list[tuple[int, RankFile]]] = {}  # by tensor: where each begins, and its file
        for file in self.files:
            for key, start in file.starts.items():
                self.slices.setdefault(key, []).append((start, file))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """(length) float32 of `weight`, `ema` or a moment of the flattened parameter `name`."""
        key, numbers, filled = f"{kind}/{name}", torch.empty(length), 0
        for begin, file in sorted(self.slices.get(key, ()), key=lambda item: item[0]):
            end = begin + len(file.file.specs[key])
            low, high = max(start, begin), min(start + length, end)
            if low < high and low == start + filled:  # neither a gap nor an overlap
                numbers[low - start : high - start] = file.read(key)[low - begin : high - begin]
                filled += high - low
        if filled != length:
            where = storage.parent(self.files[0].path) if self.files else "no file"
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
            for key in shard.moments(optimizer) if self.steps else ():
                shard.moment(optimizer, key).copy_(self.read(key, *span))
