"""Files of the released models: which variant one is, its key names with and without prefix, and the FastVideo port's.

Names and shapes of the official layout are the parameters' own. Sources: the released configs of Matrix-Game 2.0, and
the name table of FastVideo 0.2.1 (configs/models/dits/matrixgame2.py) for the port.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs import storage, to_dict
from configs.errors import MissingFileError, UserError
from configs.foreign import reading
from model.action_dit import ActionDiT
from model.bare_names import OFFICIAL_PREFIX, bare_names
from model.config import ActionDiTConfig
from model.foreign import PICKLES, open_foreign, read_json
from model.weights import INDEX_SUFFIX, LazyWeights, finite, require_same_tensors

Layout = Literal["official", "diffusers"]
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # what both layouts call the one file of a folder

# Of the official `action_config`; without a mouse those with `mouse_` are left out.
ACTION_NAMES = (
    "blocks", "enable_keyboard", "enable_mouse", "heads_num", "hidden_size", "keyboard_dim_in", "keyboard_hidden_dim",
    "mouse_dim_in", "mouse_hidden_dim", "mouse_qk_dim_list", "rope_dim_list", "rope_theta",
    "vae_time_compression_ratio", "windows_size",
)  # fmt: skip

# Official name -> the port's, first match wins; what matches none is called the same in both.
DIFFUSERS_NAMES = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    ("blocks.{i}.self_attn.o.", "blocks.{i}.attn1.to_out.0."),
    ("blocks.{i}.cross_attn.o.", "blocks.{i}.attn2.to_out.0."),
    *((f"blocks.{{i}}.self_attn.{x}.", f"blocks.{{i}}.attn1.to_{x}.") for x in "qkv"),
    *((f"blocks.{{i}}.cross_attn.{x}.", f"blocks.{{i}}.attn2.to_{x}.") for x in "qkv"),
    ("blocks.{i}.self_attn.norm_", "blocks.{i}.attn1.norm_"),
    ("blocks.{i}.cross_attn.norm_", "blocks.{i}.attn2.norm_"),
    ("blocks.{i}.norm3.", "blocks.{i}.norm2."),
    ("blocks.{i}.ffn.0.", "blocks.{i}.ffn.net.0.proj."),
    ("blocks.{i}.ffn.2.", "blocks.{i}.ffn.net.2."),
)
OFFICIAL_NAMES = (*((port, ours) for ours, port in DIFFUSERS_NAMES), ("patch_embedding.proj.", "patch_embedding."))


@dataclass(frozen=True)
class Provenance:
    """Where the weights of an imported checkpoint come from; its config.yaml."""

    source: str  # file or index of shards
    layout: Layout
    prefix: str  # what stood before every official name


@dataclass(frozen=True)
class ExportConfig:
    """`python -m model export <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    format: Layout
    out: str  # folder that gets the weights and their config.json
    weights: Literal["ema", "model"] = "ema"
    prefix: Literal["model.", "none"] | None = None  # of official names; not given: as the imported file had it
    codec: str | None = None  # the one that it was trained with, where it does not lie beside the checkpoint
    dtype: Literal["keep", "bf16", "fp32"] = "keep"  # released: the foundation in bf16, the students in fp32


def read_official(path: str | Path, config: ActionDiTConfig) -> tuple[LazyWeights, Provenance]:
    """The weights, official or FastVideo-style, in the file or folder `path`, under the model's own names.

    Raises in one line: nothing there, more than one candidate, a damaged file, one with code in it, a variant other
    than `config` (with the first settings that differ), names or shapes that are missing, unexpected or wrong.
    """
    local = storage.local(str(path).rstrip("/"))
    file = weights_file(local)
    stored = open_foreign(file)
    found = bare_names(stored.specs)
    found.say(str(file))
    weights = finite(stored.renamed(found.names))
    layout: Layout = "diffusers" if "proj_out.weight" in weights else "official"
    if layout == "diffusers":
        weights = weights.renamed({name: official_name(name) for name in weights})
    check_variant(config, weights.specs, config_beside(file), str(file))
    return weights, Provenance(str(path) + str(file).removeprefix(str(local)), layout, found.prefix)


def weights_file(path: str | Path) -> Path:
    """`path` itself, or the one weights file or index of shards in the folder `path`."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"no weights {path}; give an official file, or the folder that holds it")
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = indices or sorted(path.glob("*.safetensors"))
    files = files or sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if len(files) != 1:
        found = f"{len(files)} of them: {', '.join(file.name for file in files)}" if files else "none"
        raise UserError(f"{path} must hold one weights file or index of shards, and there are {found}; name the file")
    return files[0]


def check_variant(config: ActionDiTConfig, specs: Mapping[str, Tensor], beside: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless tensors like `specs`, and the config.json `beside` them, are those of `config`."""
    with torch.device("meta"):
        expected = ActionDiT(config).state_dict()
    with reading(f"the config.json beside {where}"):
        ours, theirs = flat(config), {**settings_of_tensors(specs), **settings_of_json(beside)}
    differing = [
        f"model.{name}={_shown(value)} (config {_shown(ours[name])})"
        for name, value in theirs.items()
        if name in ours and ours[name] != value
    ]
    named = f": it has {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}" if differing else ""
    require_same_tensors(expected, specs, f"{where} is of another variant than the config{named}")
    if differing:
        raise UserError(f"{where} is of another variant than the config{named}")


def settings_of_tensors(specs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dotted settings of ActionDiTConfig that the shapes of official tensors tell; those they do not are left out."""

    def shape(name: str) -> tuple[int, ...]:
        return tuple(specs[name].shape) if name in specs else ()

    found: dict[str, Any] = {}
    patch, ffn, head = shape("patch_embedding.weight"), shape("blocks.0.ffn.0.weight"), shape("head.head.weight")
    if len(patch) == 5:
        found |= {"dim": patch[0], "in_dim": patch[1], "patch_size": list(patch[2:])}
        found |= {"out_dim": head[0] // prod(patch[2:])} if head else {}
    found |= {"ffn_dim": ffn[0]} if ffn else {}
    found |= {"num_layers": 1 + max(_block_numbers(specs))} if _block_numbers(specs) else {}
    found |= {"freq_dim": shape("time_embedding.0.weight")[1]} if shape("time_embedding.0.weight") else {}
    found |= {"img_dim": shape("img_emb.proj.0.weight")[0]} if shape("img_emb.proj.0.weight") else {"vision": "none"}
    found |= {"action.blocks": (owners := _block_numbers(name for name in specs if ".action_model." in name))}
    if not owners:
        return found
    module = f"blocks.{owners[0]}.action_model."
    embed, keys, mouse = (
        shape(f"{module}{name}.weight") for name in ("keyboard_embed.0", "mouse_attn_q", "mouse_mlp.0")
    )
    found |= {"action.enable_keyboard": bool(embed), "action.enable_mouse": bool(mouse)}
    found |= {"action.keyboard_dim_in": embed[1], "action.hidden_size": embed[0]} if embed else {}
    found |= {"action.keyboard_hidden_dim": keys[0]} if keys else {}
    return found | ({"action.mouse_hidden_dim": mouse[0]} if mouse else {})


def flat(config: ActionDiTConfig) -> dict[str, Any]:
    """The settings of `config` by dotted name; without action modules their list of blocks is empty."""
    values = to_dict(config)
    parts = {"action": values.pop("action") or {"blocks": []}, "causal": values.pop("causal") or {}}
    return values | {f"{part}.{name}": value for part, held in parts.items() for name, value in held.items()}


def config_beside(file: Path) -> dict[str, Any]:
    """The config.json (or base_config.json, as the foundation's is called) in the folder of `file`, if any."""
    paths = [file.parent / name for name in ("config.json", "base_config.json")]
    return next((read_json(path) for path in paths if path.is_file()), {})


def settings_of_json(given: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted settings of ActionDiTConfig in an official config.json; mouse settings only where there is a mouse."""
    action = given.get("action_config") or {}
    names = [name for name in action if not name.startswith("mouse_") or action.get("enable_mouse", True)]
    found = {**given, **{f"action.{name}": action[name] for name in names if name != "patch_size"}}
    window = given.get("local_attn_size")
    found |= {"causal.window": window if window > 0 else None} if isinstance(window, int) else {}
    return found | ({"causal.sink": given["sink_size"]} if "sink_size" in given else {})


def official_json(config: ActionDiTConfig) -> dict[str, Any]:
    """The config.json of the official layout."""
    values = to_dict(config)
    sizes = {name: values[name] for name in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim")}
    fixed = {"_class_name": "CausalWanModel", "model_type": "i2v", "qk_norm": True, "cross_attn_norm": True}
    return {
        **fixed,
        **sizes,
        "freq_dim": config.freq_dim,
        "eps": config.eps,
        **_past_json(config),
        **_action_json(config),
    }


def diffusers_json(config: ActionDiTConfig) -> dict[str, Any]:
    """The config.json of FastVideo's port; its bidirectional class has an action module in every block."""
    everywhere = config.action is None or len(config.action.blocks) == config.num_layers
    return {
        "_class_name": "MatrixGame2WanModel" if everywhere else "CausalMatrixGame2WanModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "num_layers": config.num_layers,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.img_dim,
        "text_dim": 0,
        "patch_size": list(config.patch_size),
        "eps": config.eps,
        "num_frames_per_block": config.causal.block if config.causal else 3,
        **_past_json(config),
        **_action_json(config),
    }


def _past_json(config: ActionDiTConfig) -> dict[str, Any]:
    window = config.causal.window if config.causal else None
    return {"local_attn_size": window or -1, "sink_size": config.causal.sink if config.causal else 0}


def _action_json(config: ActionDiTConfig) -> dict[str, Any]:
    if config.action is None:
        return {}
    values = to_dict(config.action)
    names = (
        ACTION_NAMES if config.action.enable_mouse else [name for name in ACTION_NAMES if not name.startswith("mouse_")]
    )
    action = {name: values["rope_dim_list" if name == "mouse_qk_dim_list" else name] for name in names}
    fixed = {"img_hidden_size": config.dim, "patch_size": list(config.patch_size), "qk_norm": True, "qkv_bias": False}
    return {"action_config": {**action, **fixed}}


def converted(weights: LazyWeights, export: ExportConfig) -> LazyWeights:
    """`weights` of a checkpoint under the names and in the dtype that `export` asks for."""
    weights = weights.renamed(bare_names(weights.specs).names)
    if export.dtype != "keep":
        weights = weights.cast({"bf16": torch.bfloat16, "fp32": torch.float32}[export.dtype])
    if export.format == "diffusers":
        return weights.renamed({name: diffusers_name(name) for name in weights})
    recorded = weights.metadata.get("prefix", "")
    prefix = recorded if export.prefix is None else OFFICIAL_PREFIX if export.prefix == OFFICIAL_PREFIX else ""
    return weights.renamed({name: prefix + name for name in weights})


def unused_scales(weights: Mapping[str, Tensor]) -> int:
    """How many RMS scales of the action modules are not all ones: upstream ignores them, FastVideo's port does not."""
    names = [name for name in weights if re.search(r"(img|key)_attn_[qk]_norm\.weight$", name)]
    return sum(bool((weights[name] != 1).any()) for name in names)


def diffusers_name(name: str) -> str:
    """The port's name of an official parameter."""
    return _renamed(name, DIFFUSERS_NAMES)


def official_name(name: str) -> str:
    """The official name of the port's parameter."""
    return _renamed(name, OFFICIAL_NAMES)


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    numbered = re.match(r"blocks\.(\d+)\.", name)
    general = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
    for start, other in table:
        if general.startswith(start):
            general = other + general.removeprefix(start)
            break
    return general.replace("{i}", numbered[1]) if numbered else general


def ranges(indices: Iterable[int]) -> str:
    """0-14,20 for sorted block numbers."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _block_numbers(names: Iterable[str]) -> list[int]:
    matches = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return sorted({int(match[1]) for match in matches if match})


def _shown(value: Any) -> str:
    is_blocks = isinstance(value, list) and len(value) > 3 and all(isinstance(one, int) for one in value)
    return ranges(value) if is_blocks else str(value)
