"""What a run needs to go on: weights, moments and averages, by parameter, in the runs of numbers that each rank owns.

Every engine cuts the parameters up in its own way, but a cut is always a run of a flattened parameter. Written down as
(name, start, numbers), one engine's state is every engine's: on as many ranks, on others, under another ZeRO stage.
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
    """A run of one parameter that this rank optimises, as views: what is written into them is restored."""

    name: str
    start: int  # in the flattened parameter
    weight: Tensor  # (n) float32
    owner: Tensor  # the optimizer's own tensor that holds it: the key of its state
    offset: int  # of the run in the flattened local part of `owner`

    def moment(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        """(n) of the optimizer's state."""
        whole = optimizer.state[self.owner][key]
        return local_part(whole).view(-1)[self.offset : self.offset + len(self.weight)]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that FSDP2 may have cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def adam_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps Adam has made: the exponent of its bias correction."""
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert len(steps) <= 1, steps
    return steps.pop() if steps else 0


def collect_state(
    shards: Iterable[ParamShard],
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of this rank's file; `averages` (n) by the shards' names, `buffers` whole."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for shard in shards:
        if not len(shard.weight):  # fewer rows than ranks
            continue
        starts[shard.name] = shard.start
        tensors[f"weight/{shard.name}"] = shard.weight
        tensors[f"ema/{shard.name}"] = averages[shard.name]
        if shard.owner in optimizer.state:
            tensors |= {f"{key}/{shard.name}": shard.moment(optimizer, key) for key in MOMENTS}
    for name, buffer in buffers.items():
        starts[name] = 0
        tensors |= {f"{what}/{name}": buffer.detach().float().flatten() for what in ("weight", "ema")}
    return tensors, {STARTS: json.dumps(starts), STEP: str(adam_steps(optimizer))}


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata that tells altered numbers from those that were written."""
    return {CHECKSUMS: json.dumps({name: _crc32(tensor) for name, tensor in tensors.items()})}


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class SavedState:
    """The files of all ranks together, on disk or in a bucket; numbers are read when they are asked for.

    From a bucket each tensor is a request of its own; or, where `copies` is given, a file of which anything is asked is
    copied to this machine until `copies` is closed.
    """

    def __init__(self, paths: Iterable[str | Path], copies: ExitStack | None = None) -> None:
        """Raises ValueError in one line for files that are no complete state."""
        self.runs: dict[str, list[tuple[int, LazyWeights]]] = {}
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
            compared = _compared(file, path)
            for key in file:
                self.runs.setdefault(key, []).append((starts[key], compared))

    def read(self, what: str, name: str, start: int, length: int) -> Tensor:
        """(length) float32 of `weight`, `ema` or a moment of the flattened parameter `name`."""
        key, found, filled = f"{what}/{name}", torch.empty(length), 0
        for begin, file in sorted(self.runs.get(key, ()), key=lambda run: run[0]):
            end = begin + len(file.specs[key])
            low, high = max(start, begin), min(start + length, end)
            if low < high and low == start + filled:  # neither a gap nor an overlap
                found[low - start : high - start] = file[key][low - begin : high - begin]
                filled += high - low
        if filled != length:
            where = storage.parent(self.paths[0]) if self.paths else "no file"
            raise UserError(f"{where} holds {filled} of {length} numbers of {key}: it is of another model, or damaged")
        return found

    def whole(self, what: str, specs: Mapping[str, Tensor]) -> LazyWeights:
        """All tensors of `specs` (shapes by name, on the meta device), each put together when it is asked for."""
        wanted = {name: torch.empty(spec.shape, device="meta") for name, spec in specs.items()}
        return LazyWeights(
            wanted, lambda name: self.read(what, name, 0, wanted[name].numel()).reshape(wanted[name].shape)
        )

    @torch.no_grad()
    def restore(self, shards: Iterable[ParamShard], optimizer: torch.optim.Optimizer) -> None:
        """Writes weights and moments into the shards' views; the optimizer goes on counting from the saved step."""
        for shard in shards:
            if self.steps and shard.owner not in optimizer.state:
                own = optimizer.state[shard.owner]
                own["step"] = torch.tensor(float(self.steps), device=shard.weight.device)
                own |= {key: torch.zeros_like(shard.owner) for key in MOMENTS}
            span = (shard.name, shard.start, len(shard.weight))
            shard.weight.copy_(self.read("weight", *span))
            for key in MOMENTS if self.steps else ():
                shard.moment(optimizer, key).copy_(self.read(key, *span))


def _starts(file: LazyWeights, path: str | Path) -> dict[str, int]:
    """Where each tensor of a rank's file begins in the flattened parameter."""
    starts = parse_object(file.metadata[STARTS], path)
    found = {key: starts[key.partition("/")[2]] for key in file}
    for key, start in found.items():
        if type(start) is not int or start < 0 or file.specs[key].ndim != 1 or file.specs[key].dtype != torch.float32:
            raise UserError(f"{key} is no run of float32 numbers")
    return found


def _reading_copy(path: str | Path, copies: ExitStack) -> Callable[[str], Tensor]:
    copied: list[LazyWeights] = []

    def read(name: str) -> Tensor:
        if not copied:
            copied.append(open_weights(copies.enter_context(storage.cached_file(path))))
        return copied[0].read(name)

    return read


def _compared(file: LazyWeights, path: str | Path) -> LazyWeights:
    """The tensors of a rank's file; reading one whose numbers are not those that were written raises ValueError."""
    expected = parse_object(file.metadata.get(CHECKSUMS, "{}"), path)

    def read(name: str) -> Tensor:
        tensor = file.read(name)
        found = _crc32(tensor)
        if expected.get(name, found) != found:
            raise UserError(f"{path} is damaged in {name}; delete its checkpoint to resume from the one before it")
        return tensor

    return replace(file, read=read)
