"""Files of the released models: which variant one is, its key names, and those of the FastVideo port.

Names and shapes of the official layout are the parameters' own. The port (FastVideo 0.2.1, configs/models/dits/
matrixgame2.py) has diffusers' names of Wan's parameters.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs import storage, to_dict
from configs.errors import MissingFileError, UserError
from configs.untrusted import reading
from model.action_dit import ActionDiT
from model.config import ActionDiTConfig
from model.third_party import PICKLES, diffusers_names, load_third_party, read_json
from model.weights import INDEX_SUFFIX, LazyWeights, require_same_tensors

KeyNames = Literal["official", "diffusers"]
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # what both layouts call the one file of a folder

# Of the official `action_config`; without a mouse those with `mouse_` are left out.
ACTION_NAMES = (
    "blocks", "enable_keyboard", "enable_mouse", "heads_num", "hidden_size", "keyboard_dim_in", "keyboard_hidden_dim",
    "mouse_dim_in", "mouse_hidden_dim", "mouse_qk_dim_list", "rope_dim_list", "rope_theta",
    "vae_time_compression_ratio", "windows_size",
)  # fmt: skip

# Settings of ActionDiTConfig that an axis of an official tensor shows.
AXES = {
    "dim": ("patch_embedding.weight", 0),
    "in_dim": ("patch_embedding.weight", 1),
    "ffn_dim": ("blocks.{i}.ffn.0.weight", 0),
    "freq_dim": ("time_embedding.0.weight", 1),
    "img_dim": ("img_emb.proj.0.weight", 0),
    "action.keyboard_dim_in": ("blocks.{i}.action_model.keyboard_embed.0.weight", 1),
    "action.hidden_size": ("blocks.{i}.action_model.keyboard_embed.0.weight", 0),
    "action.keyboard_hidden_dim": ("blocks.{i}.action_model.mouse_attn_q.weight", 0),
    "action.mouse_hidden_dim": ("blocks.{i}.action_model.mouse_mlp.0.weight", 0),
}

# Our name of a setting in the port's config.json.
DIFFUSERS_SETTINGS = {
    "num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim", "num_layers": "num_layers",
    "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "image_dim": "img_dim", "patch_size": "patch_size", "eps": "eps",
}  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """Where the weights of an imported checkpoint come from; its config.yaml."""

    source: str  # file or index of shards
    layout: KeyNames
    prefix: str  # before every official name


def read_official(path: str | Path, config: ActionDiTConfig) -> tuple[LazyWeights, Provenance]:
    """The weights, official or FastVideo-style, in the file or folder `path`, under the model's own names.

    Raises UserError if they are of another variant than `config`, with the first settings that differ.
    """
    local = storage.local(str(path).rstrip("/"))
    file = weights_file(local)
    weights = load_third_party(file)
    names: KeyNames = "diffusers" if "proj_out.weight" in weights else "official"
    provenance = Provenance(str(path) + str(file).removeprefix(str(local)), names, weights.prefix)
    if names == "diffusers":
        official = {port: name for name, port in diffusers_names("transformer", _own_tensors(config)).items()}
        official["patch_embedding.proj.weight"] = "patch_embedding.weight"  # as FastVideo itself calls them
        official["patch_embedding.proj.bias"] = "patch_embedding.bias"
        weights = weights.renamed({name: official.get(name, name) for name in weights})
    check_variant(config, weights.specs, _config_beside(file), str(file))
    return weights, provenance


def weights_file(path: Path) -> Path:
    """`path` itself, or the one weights file or index of shards in the folder `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"no weights {path}; give an official file, or the folder that holds it")
    files = sorted(path.glob(f"*{INDEX_SUFFIX}")) or sorted(path.glob("*.safetensors"))
    files = files or sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if len(files) != 1:
        listed = f"{len(files)}: {', '.join(file.name for file in files)}" if files else "none"
        raise UserError(f"{path} must hold one weights file or index of shards, there are {listed}; name the file")
    return files[0]


def check_variant(config: ActionDiTConfig, specs: Mapping[str, Tensor], beside: Mapping[str, Any], where: str) -> None:
    """A UserError unless tensors like `specs`, and the config.json `beside` them, are those of `config`."""
    with reading(f"the config.json beside {where}"):
        ours, theirs = _dotted(config), {**settings_of_tensors(specs), **settings_of_json(beside)}
    differing = [
        f"model.{name}={_shown(value)} (config {_shown(ours[name])})"
        for name, value in theirs.items()
        if name in ours and ours[name] != value
    ]
    listed = f": it has {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}" if differing else ""
    require_same_tensors(_own_tensors(config), specs, f"{where} is of another variant than the config{listed}")
    if differing:
        raise UserError(f"{where} is of another variant than the config{listed}")


def _own_tensors(config: ActionDiTConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return ActionDiT(config).state_dict()


def settings_of_tensors(specs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The dotted settings of ActionDiTConfig that names and shapes of official tensors show."""
    shapes = {general_name(name): tuple(spec.shape) for name, spec in specs.items()}
    blocks, action_blocks = _block_numbers(specs), _block_numbers(name for name in specs if ".action_model." in name)
    sizes = {name: shapes[tensor][axis] for name, (tensor, axis) in AXES.items() if len(shapes.get(tensor, ())) > axis}
    settings: dict[str, Any] = {"num_layers": blocks[-1] + 1} if blocks else {}
    settings |= {"action.blocks": action_blocks} | ({} if "img_dim" in sizes else {"vision": "none"})
    if action_blocks:
        settings["action.enable_keyboard"] = "action.keyboard_dim_in" in sizes
        settings["action.enable_mouse"] = "action.mouse_hidden_dim" in sizes
    return settings | sizes


def settings_of_json(given: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted settings of ActionDiTConfig in an official config.json; mouse settings only where there is a mouse."""
    action = given.get("action_config") or {}
    names = [name for name in action if not name.startswith("mouse_") or action.get("enable_mouse", True)]
    settings = {**given, **{f"action.{name}": action[name] for name in names if name != "patch_size"}}
    window = given.get("local_attn_size")
    settings |= {"causal.window": window if window > 0 else None} if isinstance(window, int) else {}
    return settings | ({"causal.sink": given["sink_size"]} if "sink_size" in given else {})


def _dotted(config: ActionDiTConfig) -> dict[str, Any]:
    """The settings of `config` by dotted name; without action modules their list of blocks is empty."""
    values = to_dict(config)
    groups = {"action": values.pop("action") or {"blocks": []}, "causal": values.pop("causal") or {}}
    return values | {f"{group}.{name}": value for group, inner in groups.items() for name, value in inner.items()}


def _config_beside(file: Path) -> dict[str, Any]:
    """The config.json (or base_config.json, as the foundation's is called) in the folder of `file`, if any."""
    paths = [file.parent / name for name in ("config.json", "base_config.json")]
    return next((read_json(path) for path in paths if path.is_file()), {})


def config_json(config: ActionDiTConfig, names: KeyNames) -> dict[str, Any]:
    """The config.json of the official layout, or of FastVideo's port."""
    values = to_dict(config)
    window, sink = (config.causal.window, config.causal.sink) if config.causal else (None, 0)
    shared = {"local_attn_size": window or -1, "sink_size": sink, **_action_json(config)}
    if names == "official":
        fixed = {"_class_name": "CausalWanModel", "model_type": "i2v", "qk_norm": True, "cross_attn_norm": True}
        sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "eps")
        return {**fixed, **{name: values[name] for name in sizes}, **shared}
    everywhere = config.action is None or len(config.action.blocks) == config.num_layers
    return {  # the port's bidirectional class has an action module in every block
        "_class_name": "MatrixGame2WanModel" if everywhere else "CausalMatrixGame2WanModel",
        **{name: values[ours] for name, ours in DIFFUSERS_SETTINGS.items()},
        "attention_head_dim": config.dim // config.num_heads,
        "text_dim": 0,
        "num_frames_per_block": config.causal.block if config.causal else 3,
        **shared,
    }


def _action_json(config: ActionDiTConfig) -> dict[str, Any]:
    if config.action is None:
        return {}
    values = to_dict(config.action)
    values["mouse_qk_dim_list"] = values["rope_dim_list"]
    names = [name for name in ACTION_NAMES if config.action.enable_mouse or not name.startswith("mouse_")]
    fixed = {"img_hidden_size": config.dim, "patch_size": list(config.patch_size), "qk_norm": True, "qkv_bias": False}
    return {"action_config": {**{name: values[name] for name in names}, **fixed}}


def general_name(name: str) -> str:
    """The name of a parameter with {i} for the number of its block."""
    return re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)


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
    is_blocks = isinstance(value, list) and len(value) > 3 and all(isinstance(number, int) for number in value)
    return ranges(value) if is_blocks else str(value)
