"""`python -m model import` and `export`: checkpoints of official weights, and weights of checkpoints to hand on."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from configs import storage
from configs.errors import UserError
from configs.files import require_other_files
from configs.game import GameConfig
from model.codec import codec_hash
from model.config import ActionDiTConfig
from model.flow import FlowMatchConfig
from model.layout import Layout
from model.official import WEIGHTS_NAME, check_variant, config_json, read_official, require_official_parts
from model.third_party import diffusers_names
from model.weights import LazyWeights, open_weights, save_weights
from model.world import (
    COMPLETE,
    WORLD_FILE,
    Weights,
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


@dataclass(frozen=True)
class ExportConfig:
    """`python -m model export <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    format: Literal["worldloom", "official", "diffusers"]  # worldloom: what playing needs, nothing of training
    out: str  # folder that gets the weights, and their config.json if others are to read them
    weights: Weights = "ema"
    prefix: Literal["model.", "none"] | None = None  # of official names; not given: as the imported file had it
    codec: str | None = None  # the one that it was trained with, where it does not lie beside the checkpoint
    dtype: Literal["keep", "bf16", "fp32"] = "keep"  # released: the foundation in bf16, the students in fp32


def import_official(config: ImportConfig) -> None:
    """Make a checkpoint of official weights: FILE_OR_FOLDER model.yaml game.yaml codec=... out=..."""
    file, out, codec = config.file.rstrip("/"), config.out, config.codec
    written = ("model.safetensors", "ema.safetensors", WORLD_FILE, COMPLETE)
    read = {"codec": storage.files_at(codec), "official weights": storage.files_at(file)}
    require_other_files([storage.join(out, name) for name in written], read)
    world = WorldModelConfig(config.model, config.flow, config.game, config.layout, codec, codec_hash(codec))
    weights, provenance = read_official(file, world.model)
    with writing_world(out, world, codec) as folder:
        save_weights(weights, folder / "model.safetensors", provenance)
    gib = sum(spec.nbytes for spec in weights.specs.values()) / 2**30
    print(f"{out}: {len(weights)} tensors, {gib:.2f} GiB, {provenance['layout']} names, {provenance['source']}")


def export(config: ExportConfig) -> None:
    """Write a checkpoint's weights, to play or for others: CHECKPOINT format=worldloom|official|diffusers out=folder"""
    checkpoint = find_checkpoint(config.checkpoint)
    world, file = read_world_config(checkpoint), storage.join(checkpoint, f"{config.weights}.safetensors")
    if config.format == "worldloom":
        if config.prefix:
            raise UserError(f"prefix={config.prefix} is of official names, not of format=worldloom: leave it out")
        with writing_world(config.out, world, find_codec(checkpoint, world, config.codec)) as folder:
            save_weights(_cast(open_weights(file), config), folder / "ema.safetensors")
        print(f"{config.out}: play it with python -m sampling play {config.out}")
        return
    require_official_parts(world.model)
    codec, without_codec = None, ""
    try:
        codec = find_codec(checkpoint, world, config.codec)
    except ValueError as error:  # others need none: their format can still be written
        if config.codec:
            raise
        without_codec = f"note: without a codec, so that others can read it, but it cannot be played here: {error}"
    weights = open_weights(file)
    check_variant(world.model, weights.specs, {}, file)
    exported = _rename(weights, config)
    with writing_world(config.out, world, codec) as folder:
        save_weights(exported, folder / WEIGHTS_NAME)
        storage.write_text(folder / "config.json", json.dumps(config_json(world.model, config.format), indent=1))
    print(f"{storage.join(config.out, WEIGHTS_NAME)}: {len(exported)} tensors, the first {next(iter(exported))}")
    if without_codec:
        print(without_codec)
    if config.format == "diffusers" and (scales := count_unused_scales(weights)):
        print(f"note: {scales} RMS scales of the action modules are not 1; only the FastVideo port applies them")


def _cast(weights: LazyWeights, config: ExportConfig) -> LazyWeights:
    if config.dtype == "keep":
        return weights
    return weights.cast({"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype])


def _rename(weights: LazyWeights, config: ExportConfig) -> LazyWeights:
    """`weights` of a checkpoint under the names and in the dtype that `config` asks for."""
    weights = _cast(weights, config)
    if config.format == "diffusers":
        return weights.renamed(diffusers_names("transformer", weights))
    prefix = "" if config.prefix == "none" else config.prefix or weights.metadata.get("prefix", "")
    return weights.renamed({name: prefix + name for name in weights})


def count_unused_scales(weights: Mapping[str, Tensor]) -> int:
    """How many RMS scales of the action modules are not all ones: upstream ignores them, FastVideo's port does not."""
    names = [name for name in weights if re.search(r"(img|key)_attn_[qk]_norm\.weight$", name)]
    return sum(bool((weights[name] != 1).any()) for name in names)
