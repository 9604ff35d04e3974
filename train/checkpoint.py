"""What resuming needs beyond `model/world.py`: where a run stands, and what must be the same to go on from there."""

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import build_from, flat, load_file, storage, to_dict
from configs.errors import MissingFileError, UserError
from configs.files import require_no_folder, require_other_files
from configs.overrides import read_settings
from configs.untrusted import parse_object, reading
from data_pipeline.types import Manifest
from model.action_dit import ActionDiT
from model.third_party import PICKLES
from model.weights import open_weights, save_weights
from model.world import (
    COMPLETE,
    STEP_FOLDERS,
    Weights,
    WorldModelConfig,
    checkpoint_files,
    complete_steps,
    find_checkpoint,
    find_codec,
    newest_step,
    read_complete,
    read_world_config,
    writing_world,
)
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine
from train.state import SavedState

FORMAT = 1  # of what resuming reads
TRAINER = "trainer"  # the folder of what only resuming needs
POSITION = "position.json"
OF_SAMPLES = ("seed", "manifest", "manifests", "loader.shuffle_shards")  # settings that decide their order
MAY_DIFFER = ("codec", "model.checkpoint_every", "model.attention")  # where a file lies, and how things are computed
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


def step_folder(run: str | Path, step: int) -> str:
    return storage.join(run, f"step_{step:07d}")


def state_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def weight_specs(world: WorldModelConfig) -> Mapping[str, Tensor]:
    """Names and shapes of the model's weights, on the meta device."""
    with torch.device("meta"):
        return ActionDiT(world.model).state_dict()


def find_resumable(config: TrainConfig, world: WorldModelConfig) -> tuple[str, Position] | None:
    """The checkpoint that a run of `config` goes on from, and where it stands: its own newest complete one, or at first
    that of `resume`. UserError if it is damaged, of another model, flow, game or codec, or if `out` holds checkpoints
    that did not begin at `resume`."""
    own, origin = newest_step(config.checkpoints), config.resume
    checkpoint = own or origin
    if checkpoint is None:
        return None
    if origin and own:
        _require_branch(own, origin)
    elif origin:
        _require_complete(origin.rstrip("/"))
    position = read_position(checkpoint)
    if own is None and position.step >= config.steps:
        raise UserError(
            f"resume={checkpoint} has {position.step} steps done, and steps={config.steps}; give more steps"
        )
    there, here = flat(to_dict(read_world_config(checkpoint))), flat(to_dict(world))
    if differing := _differing(there, here, (there.keys() | here.keys()) - set(MAY_DIFFER)):
        remedy = "choose another out=" if own else "use the same"
        raise UserError(f"{checkpoint} is of another run ({differing}); {remedy}")
    return checkpoint, position


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str]) -> str:
    """Those of the settings `names` that differ, with both values."""
    return "; ".join(
        f"{name} {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in sorted(names)
        if there.get(name) != here.get(name)
    )


def _require_complete(folder: str) -> None:
    if storage.exists(storage.join(folder, COMPLETE)):
        return
    run = storage.parent(folder) if fnmatch.fnmatch(storage.name_of(folder), STEP_FOLDERS) else folder
    steps = ", ".join(complete_steps(run)[-8:]) or "none"
    raise MissingFileError(
        f"resume={folder} is no complete checkpoint (in {run}: {steps}); name one, as in resume=runs/my/step_0000500"
    )


def _require_branch(own: str, origin: str) -> None:
    place = storage.join(own, "config.yaml")
    with reading(place):
        began = read_settings(storage.local(place)).get("resume")
    if began != absolute(origin):
        raise UserError(
            f"{own} is there, and no branch of resume={origin}; choose another out=, or go on from it without resume="
        )


def absolute(url: str) -> str:
    """The same place, wherever a program is started."""
    return url.rstrip("/") if storage.is_s3(url) else str(Path(url).resolve())


def read_position(folder: str | Path) -> Position:
    """Where the complete checkpoint `folder` stands. Raises UserError unless a run can go on from it."""
    version = read_complete(folder)
    if version != FORMAT:
        remedy = "use a newer one" if version > FORMAT else f"start a new run from its weights with init={folder}"
        raise UserError(f"{folder} has format {version}, this Worldloom goes on from format {FORMAT}; {remedy}")
    place = storage.join(folder, f"{TRAINER}/{POSITION}")
    with reading(place):
        return build_from(Position, parse_object(storage.read_bytes(place), place), place)


def state_of(folder: str | Path, copies: ExitStack | None = None) -> SavedState:
    """What all ranks wrote into the complete checkpoint `folder`; `copies` as of SavedState."""
    names = fnmatch.filter(storage.list_folder(storage.join(folder, TRAINER)), "rank_*.safetensors")
    return SavedState([storage.join(folder, f"{TRAINER}/{name}") for name in names], copies)


def data_digest(manifests: Sequence[Manifest], config: TrainConfig) -> str:
    """16 hex digits that change with the shards, wherever they lie, with their order and with their mixture."""
    mixture = [[source.weight for source in config.sources], config.loader.shuffle_shards]
    parts = [to_dict(manifest) for manifest in manifests] + ([] if mixture == [[1.0], 0] else [mixture])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def require_same_data(config: TrainConfig, data: str, position: Position, folder: str | Path) -> None:
    """UserError that names what differs unless `config`, whose shards have the digest `data`, has the samples of the
    saved run."""
    if (position.seed, position.manifest) == (config.seed, data):
        return
    saved = load_file(TrainConfig, storage.local(storage.join(folder, "config.yaml")))
    differing = _differing(flat(to_dict(saved)), flat(to_dict(config)), OF_SAMPLES)
    fault = differing or f"the shards of {config.sources[0].path} have changed since"
    raise UserError(f"{folder} was trained on other samples: {fault}; use the same, or start anew with init={folder}")


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


def load_checkpoint(engine: Engine, ema: Ema, folder: str | Path) -> None:
    """Restores the complete checkpoint `folder`, whatever engine and ranks wrote it. All ranks must call."""
    with ExitStack() as copies:
        saved = state_of(folder, copies)
        engine.restore(saved)
        ema.restore(saved)


@dataclass(frozen=True)
class ConsolidateConfig:
    """`python -m train consolidate <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    out: str  # a folder, which becomes a checkpoint with its codec; or a .safetensors, which gets the weights alone
    weights: Weights = "ema"
    codec: str | None = None  # the one that it was trained with, where it does not lie beside the checkpoint

    def __post_init__(self) -> None:
        if Path(self.out).suffix in PICKLES:
            raise UserError(f"out={self.out} must be a folder, or end in .safetensors")


def consolidate(config: ConsolidateConfig) -> None:
    """Makes a checkpoint that plays wherever it is copied, or a file of weights, of a run's checkpoint."""
    folder = find_checkpoint(config.checkpoint)
    world = read_world_config(folder)
    read = {"checkpoint": [*checkpoint_files(folder), storage.join(folder, TRAINER)], "codec": list[str]()}
    with suppress(ValueError):  # the weights alone need none
        read["codec"] = storage.files_at(find_codec(folder, world, config.codec))
    require_other_files([config.out], read)
    if weights_alone := config.out.endswith(".safetensors"):
        require_no_folder([config.out])
    position, file = read_position(folder), storage.join(folder, f"{config.weights}.safetensors")
    weights, metadata = open_weights(file), {"step": str(position.step)}
    if weights_alone:
        with storage.writing(config.out) as part:
            save_weights(weights, part, metadata)
    else:
        with writing_world(config.out, world, find_codec(folder, world, config.codec)) as there:
            save_weights(weights, there / "model.safetensors", metadata)
    print(f"{config.out}: {config.weights} weights of step {position.step}, written by {position.ranks} ranks")
