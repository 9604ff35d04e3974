"""`python -m model import` and `export`: checkpoints of official weights, and official weights of checkpoints."""

import json
from dataclasses import asdict, dataclass, field

from configs import save_config, storage
from configs.errors import UserError
from configs.files import require_other_files, write_text
from configs.game import GameConfig
from model.codec import codec_hash
from model.config import ActionDiTConfig
from model.flow import FlowMatchConfig
from model.layout import Layout
from model.official import (
    WEIGHTS_NAME,
    ExportConfig,
    check_variant,
    converted,
    diffusers_json,
    official_json,
    read_official,
    unused_scales,
)
from model.weights import open_weights, save_weights
from model.world import (
    COMPLETE,
    WORLD_FILE,
    WorldModelConfig,
    find_checkpoint,
    find_codec,
    read_world_config,
    writing_world,
)


@dataclass(frozen=True)
class ImportConfig:
    """`python -m model import <file or folder>`."""

    file: str  # official weights, or the folder that holds them
    model: ActionDiTConfig
    game: GameConfig
    codec: str  # the one that the model was trained with
    out: str  # the checkpoint's folder
    layout: Layout = "continuous"
    flow: FlowMatchConfig = field(default_factory=FlowMatchConfig)


def import_official(config: ImportConfig) -> None:
    """Make a checkpoint of official weights: FILE_OR_FOLDER model.yaml game.yaml codec=... out=..."""
    file, out, codec = config.file.rstrip("/"), config.out, config.codec
    written = ("model.safetensors", "ema.safetensors", "config.yaml", WORLD_FILE, COMPLETE)
    read = {"codec": storage.files_at(codec), "official weights": storage.files_at(file)}
    require_other_files([storage.join(out, name) for name in written], read)
    world = WorldModelConfig(config.model, config.flow, config.game, config.layout, codec, codec_hash(codec))
    action, keys = world.model.action, world.game.action_space.keys
    if action and action.enable_keyboard and action.keys != len(keys):
        raise UserError(f"the model has {action.keys} keys, {world.game.name} has {', '.join(keys)}")
    weights, provenance = read_official(file, world.model)
    with writing_world(out, world, codec) as folder:
        save_weights(weights, folder / "model.safetensors", asdict(provenance))
        save_config(provenance, folder / "config.yaml")
    stored = sum(spec.nbytes for spec in weights.specs.values())
    print(f"{out}: {len(weights)} tensors, {stored / 2**30:.2f} GiB, {provenance.layout} names, {provenance.source}")


def export(config: ExportConfig) -> None:
    """Write a checkpoint's weights as others read them: CHECKPOINT format=official|diffusers out=folder"""
    checkpoint = find_checkpoint(config.checkpoint)
    world, file = read_world_config(checkpoint), storage.join(checkpoint, f"{config.weights}.safetensors")
    model, codec, lacking = world.model, None, ""
    try:
        codec = find_codec(checkpoint, world, config.codec)
    except ValueError as error:  # others need none: their format can still be written
        if config.codec:
            raise
        lacking = f"note: without a codec, so that others can read it, but nobody can play it here: {error}"
    weights = open_weights(file)
    check_variant(model, weights.specs, {}, file)
    given = converted(weights, config)
    described = diffusers_json(model) if config.format == "diffusers" else official_json(model)
    with writing_world(config.out, world, codec) as folder:
        save_weights(given, folder / WEIGHTS_NAME)
        write_text(folder / "config.json", json.dumps(described, indent=1))
    print(f"{storage.join(config.out, WEIGHTS_NAME)}: {len(given)} tensors, the first {next(iter(given))}")
    if lacking:
        print(lacking)
    if config.format == "diffusers" and (scales := unused_scales(weights)):
        print(
            f"note: {scales} RMS scales of the action modules are not 1; the FastVideo port applies them, this code not"
        )
