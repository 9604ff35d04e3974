"""`python -m model import` and `export`: checkpoints of official weights, and official weights of checkpoints."""

import json
from dataclasses import asdict, replace

from configs import build, save_config, storage
from configs.errors import UserError
from configs.files import require_other_files, write_text
from configs.overrides import merge_words
from model.codec import codec_hash
from model.official import (
    WEIGHTS_NAME,
    ExportConfig,
    check_variant,
    diffusers_json,
    exported,
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


def import_official(args: list[str]) -> None:
    """Make a checkpoint of official weights: FILE_OR_FOLDER model.yaml game.yaml codec=... out=..."""
    values = merge_words(args)
    if values.get("file") is None:
        raise UserError("the first word is the official file, or the folder that holds it")
    missing = [name for name in ("model", "game", "codec", "out") if values.get(name) is None]
    if missing:
        raise UserError(f"no {', '.join(missing)}: say configs/models/X.yaml configs/games/Y.yaml codec=... out=...")
    if not all(isinstance(values[name], str) for name in ("file", "codec", "out")):
        raise UserError(f"file, codec and out are paths, not {values['file']}, {values['codec']} and {values['out']}")
    out, file = values.pop("out"), values.pop("file").rstrip("/")
    given, codec = storage.local(file), storage.local(values["codec"])
    written = ("model.safetensors", "ema.safetensors", "config.yaml", WORLD_FILE, COMPLETE)
    read = {"codec": storage.files_at(values["codec"])}
    read["official weights"] = storage.files_at(file)
    require_other_files([storage.join(out, name) for name in written], read)
    told = {"layout": "continuous", "flow": {}, **values, "codec_hash": codec_hash(codec)}
    world = build(WorldModelConfig, told)
    action, keys = world.model.action, world.game.action_space.keys
    if action and action.enable_keyboard and action.keys != len(keys):
        raise UserError(f"the model has {action.keys} keys, {world.game.name} has {', '.join(keys)}")
    weights, origin = read_official(given, world.model)
    origin = replace(origin, source=file + origin.source.removeprefix(str(given)))
    with writing_world(out, world, values["codec"]) as folder:
        save_weights(weights, folder / "model.safetensors", asdict(origin))
        save_config(origin, folder / "config.yaml")
    stored = sum(spec.nbytes for spec in weights.specs.values())
    print(f"{out}: {len(weights)} tensors, {stored / 2**30:.2f} GiB, {origin.layout} names, from {origin.source}")


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
    weights = open_weights(storage.local(file))
    check_variant(model, weights.specs, {}, file)
    given = exported(weights, config)
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
