"""What can be found wrong with a run before it starts."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from configs import storage
from configs.errors import FileInTheWayError, UserError
from configs.files import require_other_files
from data_pipeline.shard_set import load_manifests, require_action_space, require_same_kind
from data_pipeline.shards import load_manifest
from data_pipeline.types import Manifest
from model.codec import codec_hash
from model.world import WorldModelConfig, find_checkpoint, newest_step, read_complete, read_world_config
from train.checkpoint import data_digest, find_resumable, fit_to_ranks, require_same_data
from train.config import TrainConfig
from train.engine import gather_objects
from train.engines import engine_of
from train.objectives import check_objective, make_objective
from train.objectives.objective import Objective
from train.validation import Videos

SEEN_S = 30  # in which a file that one machine has written appears on all others


@dataclass(frozen=True)
class CheckedRun:
    """A run whose parts belong together."""

    config: TrainConfig  # with the game's sizes in its model, and the batch and accumulation that the ranks need
    manifest: Manifest  # of the first shard set; all have its kind
    world: WorldModelConfig
    objective: Objective
    videos: Videos | None
    data: str  # digest of the training shards and of how they are mixed
    init: str | None  # weights to start from
    resumed: str | None  # checkpoint to go on from
    start: int  # step


def check_run(config: TrainConfig, ranks: int) -> CheckedRun:
    """Raises UserError or FileError for what can be found wrong without starting; nothing is written."""
    check_out(config)
    engine_of(config)
    manifests = load_manifests(config.sources)
    manifest = manifests[0]
    url = config.sources[0].path
    world = describe_world(config, manifest)
    config = replace(config, model=world.model)  # whose action modules have the sizes of the game
    objective, data = make_objective(config.objective), data_digest(manifests, config)
    check_objective(objective, config.model, manifest.layout, manifest.clip_latents)
    if config.validation.manifest:
        heldout = load_manifest(config.validation.manifest)
        shared = ("layout", "codec_hash", "vision", "unknown")
        require_same_kind(manifest, url, heldout, config.validation.manifest, shared)
    videos = Videos(config, world) if config.validation.videos.every else None
    resumed, start = None, 0
    if resumable := find_resumable(config, world):
        resumed, position = resumable
        require_same_data(config, data, position, resumed)
        config, start = fit_to_ranks(config, position, ranks, resumed), position.step
    init = None
    if config.init:
        read_complete(checkpoint := find_checkpoint(config.init))
        require_action_space(manifest, read_world_config(checkpoint).game.action_space, checkpoint)
        init = storage.join(checkpoint, "ema.safetensors")
    return CheckedRun(config, manifest, world, objective, videos, data, init, resumed, start)


def check_out(config: TrainConfig) -> None:
    """Raises an error if `out` cannot become a run's folder, or lies in what the run reads."""
    sets = [config.validation.manifest, *(source.path for source in config.sources)]
    folders = [Path(path).parent for path in sets if path and not storage.is_s3(path)]
    # A manifest may lie in a folder of many things; one that holds the shards too is theirs.
    shards = [folder for folder in folders if any(folder.glob("*.tar"))]
    init = config.init and (newest_step(config.init) or config.init)
    read = {"manifest": shards, "codec": config.codec, "resume": config.resume, "init": init}
    require_other_files([config.out], read)
    if not storage.is_s3(config.out):
        out = Path(config.out).absolute()
        parent = next(path for path in (out, *out.parents) if path.exists())
        if not parent.is_dir():
            raise FileInTheWayError(f"cannot write to {config.out}: {parent} is a file; choose another out=")


def agree(asked: TrainConfig, checked: CheckedRun, ranks: int) -> CheckedRun:
    """Checks again now that no other run can write to the folder: one may have saved since, and files of one machine
    may appear late on others. All ranks must call; all raise UserError if they never see the same newest checkpoint."""
    for _ in range(SEEN_S):
        by_rank = gather_objects((checked.resumed, newest_step(asked.out) or asked.resume))
        if {resumed for resumed, _ in by_rank} == {by_rank[0][1]}:
            return checked
        time.sleep(1)
        before, checked = checked, check_run(asked, ranks)
        if checked.config != before.config:
            raise UserError(f"another run went on from {asked.out} with other settings; start again")
    listed = ", ".join(f"rank {rank}: {resumed or 'none'}" for rank, (resumed, _) in enumerate(by_rank))
    raise UserError(f"{asked.out} differs between nodes ({listed}); use a shared folder or an s3:// url")


def describe_world(config: TrainConfig, manifest: Manifest) -> WorldModelConfig:
    """What the sampler will need. Raises UserError if manifest, codec and model do not belong together."""
    clips, causal = config.sources[0].path, config.model.causal
    unknown = "zeros" if causal is None or causal.unknown == "last" else causal.unknown
    for name, ours, theirs in (
        (f"codec={config.codec}", codec_hash(config.codec), manifest.codec_hash),
        ("model.vision", config.model.vision, manifest.vision),
        ("model.causal.unknown", unknown, manifest.unknown),
    ):
        if ours != theirs:
            raise UserError(f"{name} is {ours}, but {clips} was encoded with {theirs}")
    game, layout = manifest.game, manifest.layout
    return WorldModelConfig(config.model, config.flow, game, layout, config.codec, manifest.codec_hash)
