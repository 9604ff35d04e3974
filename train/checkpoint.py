"""Checkpoints: what is in their folders, which to go on from, and what must be the same for that."""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from configs import flat, load_config, to_dict
from data_pipeline.types import Manifest
from model.action_dit import ActionDiT
from model.weights import save_weights
from sampling.world_model import (
    COMPLETE,
    Weights,
    WorldModelConfig,
    complete_checkpoints,
    newest_checkpoint,
    read_world_config,
)
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine
from train.state import SavedState

FORMAT = 1  # of what resuming reads
TRAINER = "trainer"  # what only resuming needs
POSITION = "position.json"
MAY_DIFFER = ("codec", "model.checkpoint_every", "model.attention")  # where a file lies, and how things are computed
WEIGHTS: dict[Weights, str] = {"model": "weight", "ema": "ema"}  # files for everyone, and what of the state


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int  # optimizer steps done
    ranks: int
    batch: int
    accumulation: int
    seed: int  # with the manifest: of the order of the samples
    manifest: str  # `manifest_digest` of the training shards

    @property
    def clips_per_step(self) -> int:
        """The global batch: the order of the samples, and what a step is, hang on it."""
        return self.ranks * self.batch * self.accumulation


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:07d}"


def state_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Holds the run folder within the block: two runs that write to it would spoil each other's checkpoints.

    Raises ValueError in one line if another live run holds it, OSError if it cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(f"{folder} is in use by the run of {file.read()}; choose another out=") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def weight_specs(world: WorldModelConfig) -> Mapping[str, Tensor]:
    """Names and shapes of the model's weights, on the meta device."""
    with torch.device("meta"):
        return ActionDiT(world.model).state_dict()


def find_resumable(run: Path, world: WorldModelConfig) -> Path | None:
    """The newest complete checkpoint of `run`, or None; raises if it is of another model, flow, game or codec."""
    found = complete_checkpoints(run)
    if not found:
        return None
    there, here = flat(to_dict(read_world_config(found[-1]))), flat(to_dict(world))
    differing = [
        f"{key} {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in sorted(there.keys() | here.keys())
        if key not in MAY_DIFFER and there.get(key) != here.get(key)
    ]
    if differing:
        raise ValueError(f"{found[-1]} is of another run ({'; '.join(differing)}); choose another out=")
    return found[-1]


def read_position(folder: Path) -> Position:
    """Where the complete checkpoint `folder` stands. Raises ValueError in one line if a file is missing or cut."""
    saved = json.loads((folder / COMPLETE).read_text())
    if (found := saved.get("format", 0)) != FORMAT:
        remedy = "use a newer one" if found > FORMAT else f"start a new run from its weights with init={folder}"
        raise ValueError(f"{folder} has format {found}, this Worldloom goes on from format {FORMAT}; {remedy}")
    for name, size in saved["bytes"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or truncated; delete {folder} to resume from the checkpoint before it")
    return Position(**json.loads((folder / TRAINER / POSITION).read_text()))


def manifest_digest(manifest: Manifest) -> str:
    """16 hex digits that are others for other shards, wherever they lie."""
    return hashlib.sha256(json.dumps(to_dict(manifest), sort_keys=True).encode()).hexdigest()[:16]


def fit_to_ranks(config: TrainConfig, data: str, position: Position, ranks: int, folder: Path) -> TrainConfig:
    """The config with the batch and the accumulation that give the saved run's clips per step on `ranks`.

    On as many ranks as before they are what `config` says. On others the batch stays, or becomes smaller, and the
    accumulation follows, so that every step has the very samples that it would have had.
    Raises ValueError in one line if that cannot be.
    """
    if (position.seed, position.manifest) != (config.seed, data):
        raise ValueError(
            f"{folder} was trained with seed={position.seed} on the shards {position.manifest}, this run has "
            f"seed={config.seed} and {config.manifest}, whose shards are {data}; use the same, or start a new run with "
            f"init={folder}"
        )
    if ranks * config.batch * config.accumulation == position.clips_per_step:
        return config
    per_rank, rest = divmod(position.clips_per_step, ranks)
    if rest or ranks == position.ranks:
        raise ValueError(
            f"{folder} was written by {position.ranks} ranks x batch {position.batch} x accumulation "
            f"{position.accumulation} = {position.clips_per_step} clips per step, which {ranks} x {config.batch} x "
            f"{config.accumulation} is not{'' if ranks == position.ranks else ' and cannot be'}; use the same, or "
            f"start a new run with init={folder}"
        )
    batch = next(size for size in range(min(config.batch, per_rank), 0, -1) if per_rank % size == 0)
    return replace(config, batch=batch, accumulation=per_rank // batch)


def load_checkpoint(engine: Engine, ema: Ema, folder: Path) -> None:
    """Restores what the complete checkpoint `folder` holds, whatever engine and ranks wrote it. All ranks must call."""
    saved = SavedState(sorted((folder / TRAINER).glob("rank_*")))
    engine.restore(saved)
    ema.restore(saved)


@dataclass(frozen=True)
class ConsolidateConfig:
    """`python -m train consolidate <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    out: str  # .safetensors
    weights: Weights = "ema"

    def __post_init__(self) -> None:
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"out={self.out} must end in .safetensors")


def consolidate(words: list[str]) -> None:
    """Puts the weights together from all ranks' files, tensor by tensor, without a GPU or a process group."""
    config = load_config(ConsolidateConfig, words)
    folder = newest_checkpoint(config.checkpoint)
    position = read_position(folder)
    saved = SavedState(sorted((folder / TRAINER).glob("rank_*")))
    whole = saved.whole(WEIGHTS[config.weights], weight_specs(read_world_config(folder)))
    save_weights(whole, config.out, {"step": str(position.step)})
    print(f"{config.out}: {config.weights} weights of step {position.step}, written by {position.ranks} ranks")
