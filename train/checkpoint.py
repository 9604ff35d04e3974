"""What resuming needs beyond `model/world.py`: where a run stands, and what must be the same to go on from there."""

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import build_from, flat, storage, to_dict
from configs.errors import UserError
from configs.files import require_other_files
from configs.overrides import read_settings
from configs.untrusted import parse_object, reading
from data_pipeline.types import Manifest
from model.action_dit import ActionDiT
from model.weights import open_weights, save_weights
from model.world import (
    Weights,
    WorldModelConfig,
    find_checkpoint,
    find_codec,
    newest_step,
    read_complete,
    read_world_config,
    writing_world,
)
from train.config import TrainConfig
from train.state import SavedState

FORMAT = 1  # of what resuming reads
TRAINER = "trainer"  # the folder of what only resuming needs
POSITION = "position.json"
MAY_DIFFER = ("codec", "model.checkpoint_every", "model.attention")  # where a file lies, and how things are computed
SAID_BY_CODEC = ("spatial", "temporal")  # of a manifest; earlier versions did not write them
WEIGHTS: dict[Weights, str] = {"model": "weight", "ema": "ema"}  # the files for everyone, by their name in the state


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int  # optimizer steps done
    ranks: int
    batch: int
    accumulation: int
    seed: int  # with the manifest: of the order of the samples
    manifest: str  # `data_digest` of the training shards

    def __post_init__(self) -> None:
        if self.step < 0 or min(self.ranks, self.batch, self.accumulation) < 1:
            raise UserError(f"no run stands at {self}")

    @property
    def clips_per_step(self) -> int:
        """The global batch, on which the order of the samples depends."""
        return self.ranks * self.batch * self.accumulation


def weight_specs(world: WorldModelConfig) -> Mapping[str, Tensor]:
    """Names and shapes of the model's weights, on the meta device."""
    with torch.device("meta"):
        return ActionDiT(world.model).state_dict()


def find_resumable(config: TrainConfig, world: WorldModelConfig) -> tuple[str, Position] | None:
    """The checkpoint that a run of `config` goes on from, and where it stands: its own newest complete one, or at first
    that of `resume`. UserError if it is damaged, of another model, flow, game or codec, or if `out` holds checkpoints
    that did not begin at `resume`."""
    newest, origin = newest_step(config.out), config.resume
    checkpoint = newest or origin
    if checkpoint is None:
        return None
    if origin:
        require_branch(newest, origin.rstrip("/"))
    position = read_position(checkpoint)
    if newest is None and position.step >= config.steps:
        raise UserError(f"resume={checkpoint} has {position.step} steps done, steps={config.steps}; give more")
    saved, asked = flat(to_dict(read_world_config(checkpoint))), flat(to_dict(world))
    for name in sorted((saved.keys() | asked.keys()) - set(MAY_DIFFER)):
        values = saved.get(name, "absent"), asked.get(name, "absent")
        if values[0] != values[1]:
            remedy = "choose another out=" if newest else "use the same"
            raise UserError(f"{checkpoint} is of a run with {name}={values[0]}, not {values[1]}; {remedy}")
    require_same_optimizer(checkpoint, config.optim.name)
    return checkpoint, position


def require_same_optimizer(checkpoint: str, asked: str) -> None:
    """UserError unless the run of the checkpoint had the optimizer `asked`: no other can use its state."""
    saved = saved_settings(checkpoint).get("optim", {})
    name = saved.get("name", "adamw") if isinstance(saved, dict) else saved  # before Muon there was no other
    if name != asked:
        raise UserError(
            f"{checkpoint} is of a run with optim.name={name}, not {asked}; use the same, or start a new run from its "
            f"weights with init={checkpoint}"
        )


def saved_settings(checkpoint: str) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint."""
    settings = storage.join(checkpoint, "config.yaml")
    with reading(settings):
        return read_settings(storage.local(settings))


def require_branch(newest: str | None, origin: str) -> None:
    """UserError unless the run with the checkpoint `newest` began at `origin`; without one, unless one can begin."""
    if newest is None:
        if (step := find_checkpoint(origin)) != origin:
            raise UserError(f"resume={origin} is a run; name one of its checkpoints, such as {step}")
        return
    if saved_settings(newest).get("resume") != absolute(origin):
        raise UserError(f"{newest} is there, and no branch of resume={origin}; choose another out=, or drop resume=")


def absolute(url: str) -> str:
    """The same place, wherever a program is started."""
    return url.rstrip("/") if storage.is_s3(url) else str(Path(url).resolve())


def read_position(folder: str | Path) -> Position:
    """Where the complete checkpoint `folder` stands. Raises UserError unless a run can go on from it."""
    version = read_complete(folder)
    if version != FORMAT:
        remedy = "use a newer one" if version > FORMAT else f"start a new run from its weights with init={folder}"
        raise UserError(f"{folder} has format {version}, this Worldloom goes on from format {FORMAT}; {remedy}")
    file = storage.join(folder, f"{TRAINER}/{POSITION}")
    with reading(file):
        return build_from(Position, parse_object(storage.read_bytes(file), file), file)


def state_of(folder: str | Path) -> SavedState:
    """What all ranks wrote into the complete checkpoint `folder`, whatever their engine and number."""
    names = fnmatch.filter(storage.list_folder(storage.join(folder, TRAINER)), "rank_*.safetensors")
    return SavedState([storage.join(folder, f"{TRAINER}/{name}") for name in names], copy=True)


def data_digest(manifests: Sequence[Manifest], config: TrainConfig) -> str:
    """16 hex digits that change with the shards, wherever they lie, with their order and with their mixture."""
    mixture = [[source.weight for source in config.sources], config.loader.shuffle_shards]
    sets = [{k: v for k, v in to_dict(manifest).items() if k not in SAID_BY_CODEC} for manifest in manifests]
    parts = [*sets, *([] if mixture == [[1.0], 0] else [mixture])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def require_same_data(config: TrainConfig, data: str, position: Position, folder: str | Path) -> None:
    """UserError unless `config`, whose shards have the digest `data`, has the samples of the saved run."""
    if (position.seed, position.manifest) != (config.seed, data):
        other = "other shards, or with other weights or loader.shuffle_shards"
        samples = other if position.seed == config.seed else f"seed={position.seed}"
        raise UserError(f"{folder} was trained on {samples}; use the same, or start anew with init={folder}")


def fit_to_ranks(config: TrainConfig, position: Position, ranks: int, folder: str | Path) -> TrainConfig:
    """The config with a batch (at most its own) and an accumulation that give the saved run's clips per step, and so
    the same samples in every step, on `ranks`. UserError if there are none, or if `config` asks for other numbers on
    as many ranks as before."""
    if ranks * config.batch * config.accumulation == position.clips_per_step:
        return config
    per_rank, rest = divmod(position.clips_per_step, ranks)
    if rest or ranks == position.ranks:
        raise UserError(
            f"{folder} was written by {position.ranks} ranks x batch {position.batch} x accumulation "
            f"{position.accumulation} = {position.clips_per_step} clips per step, which {ranks} x {config.batch} x "
            f"{config.accumulation} is not; use the same, or start a new run with init={folder}"
        )
    batch = next(size for size in range(min(config.batch, per_rank), 0, -1) if per_rank % size == 0)
    return replace(config, batch=batch, accumulation=per_rank // batch)


@dataclass(frozen=True)
class ConsolidateConfig:
    """`python -m train consolidate <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    out: str  # a folder, which becomes a checkpoint with its codec
    weights: Weights = "ema"
    codec: str | None = None  # the one that it was trained with, where it does not lie beside the checkpoint


def consolidate(config: ConsolidateConfig) -> None:
    """Makes a checkpoint that plays wherever it is copied of a run's checkpoint."""
    folder = find_checkpoint(config.checkpoint)
    world = read_world_config(folder)
    codec = find_codec(folder, world, config.codec)
    require_other_files([config.out], {"checkpoint": folder, "codec": codec})
    position = read_position(folder)
    with writing_world(config.out, world, codec) as there:
        weights = open_weights(storage.join(folder, f"{config.weights}.safetensors"))
        save_weights(weights, there / "model.safetensors", {"step": str(position.step)})
    print(f"{config.out}: {config.weights} weights of step {position.step}, written by {position.ranks} ranks")
