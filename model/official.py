"""Files of the released models: which variant one is, its key names, and those of the FastVideo port.

Names and shapes of the official layout are the parameters' own. The port (FastVideo 0.2.1, configs/models/dits/
matrixgame2.py) has diffusers' names of Wan's parameters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs import flat, storage, to_dict
from configs.errors import MissingFileError, UserError
from configs.untrusted import reading
from model.action_dit import ActionDiT
from model.config import ActionDiTConfig
from model.third_party import PICKLES, diffusers_names, load_third_party, read_json
from model.weights import INDEX_SUFFIX, LazyWeights, require_same_tensors

KeyNames = Literal["official", "diffusers"]
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # what both layouts call the one file of a folder

# Our name of a setting in the port's config.json.
DIFFUSERS_SETTINGS = {
    "num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim", "num_layers": "num_layers",
    "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "image_dim": "img_dim", "patch_size": "patch_size", "eps": "eps",
}  # fmt: skip


def read_official(path: str | Path, config: ActionDiTConfig) -> tuple[LazyWeights, dict[str, str]]:
    """The weights, official or FastVideo-style, in the file or folder `path`, under the model's own names.

    Beside them where they come from: `source` (file or index of shards), `layout` (a KeyNames) and the `prefix` of all
    names. Raises UserError if they are of another variant than `config`, with what differs.
    """
    local = storage.local(str(path).rstrip("/"))
    file = weights_file(local)
    weights = load_third_party(file)
    layout: KeyNames = "diffusers" if "proj_out.weight" in weights else "official"
    source = str(path) + str(file).removeprefix(str(local))
    if layout == "diffusers":
        official = {port: name for name, port in diffusers_names("transformer", _own_tensors(config)).items()}
        official["patch_embedding.proj.weight"] = "patch_embedding.weight"  # as FastVideo itself calls them
        official["patch_embedding.proj.bias"] = "patch_embedding.bias"
        weights = weights.renamed({name: official.get(name, name) for name in weights})
    check_variant(config, weights.specs, _config_beside(file), str(file))
    return weights, {"source": source, "layout": layout, "prefix": weights.prefix}


def weights_file(path: Path) -> Path:
    """`path` itself, or the one weights file or index of shards in the folder `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"no weights {path}; give an official file, or the folder that holds it")
    kinds = ([INDEX_SUFFIX], [".safetensors"], PICKLES)
    listings = (sorted(file for file in path.iterdir() if file.name.endswith(tuple(endings))) for endings in kinds)
    files = next(filter(None, listings), [])
    if len(files) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path} must hold one weights file or index of shards, there are {listed}; name the file")
    return files[0]


def require_official_parts(config: ActionDiTConfig) -> None:
    """A UserError for a model with parts that no other program has."""
    action = config.action
    ours = {
        "model.borders": bool(config.borders),
        "model.rope_theta": config.rope_theta != ActionDiTConfig.rope_theta,
        "model.action.time_path": bool(action and action.time_path),
        "model.action.place_path": bool(action and action.place_path),
        "model.causal.unknown=last": bool(config.causal and config.causal.unknown == "last"),
    }
    if listed := ", ".join(name for name in ours if ours[name]):
        raise UserError(f"the official format has no {listed}; only models trained without them can be exported")


def check_variant(config: ActionDiTConfig, specs: Mapping[str, Tensor], beside: Mapping[str, Any], where: str) -> None:
    """A UserError unless tensors like `specs`, and the config.json `beside` them, are those of `config`."""
    with reading(f"the config.json beside {where}"):
        ours, theirs = flat(to_dict(config)), settings_of_json(beside)
    differing = [
        f"model.{name}={value} (config {ours[name]})"
        for name, value in theirs.items()
        if name in ours and ours[name] != value
    ]
    listed = f": it has {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}" if differing else ""
    fault = f"{where} is of another variant than the config{listed}"
    require_same_tensors(_own_tensors(config), specs, fault)
    if differing:
        raise UserError(fault)


def _own_tensors(config: ActionDiTConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return ActionDiT(config).state_dict()


def settings_of_json(given: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted settings of ActionDiTConfig in an official config.json; mouse settings only where there is a mouse."""
    action = given.get("action_config") or {}
    names = [name for name in action if not name.startswith("mouse_") or action.get("enable_mouse", True)]
    settings = {**given, **{f"action.{name}": action[name] for name in names if name != "patch_size"}}
    window = given.get("local_attn_size")
    settings |= {"causal.window": window if window > 0 else None} if isinstance(window, int) else {}
    return settings | ({"causal.sink": given["sink_size"]} if "sink_size" in given else {})


def _config_beside(file: Path) -> dict[str, Any]:
    """The config.json (or base_config.json, as the foundation's is called) in the folder of `file`, if any."""
    paths = [file.parent / name for name in ("config.json", "base_config.json")]
    return next((read_json(path) for path in paths if path.is_file()), {})


def config_json(config: ActionDiTConfig, names: KeyNames) -> dict[str, Any]:
    """The config.json of the official layout, or of FastVideo's port."""
    values, causal, action = to_dict(config), config.causal, config.action
    window, sink = (causal.window, causal.sink) if causal else (None, 0)
    shared: dict[str, Any] = {"local_attn_size": window or -1, "sink_size": sink}
    if action:
        settings = values["action"] | {"mouse_qk_dim_list": values["action"]["rope_dim_list"]}
        for name in ("input_gain", "time_path", "place_path"):
            del settings[name]  # ours
        fixed = {"img_hidden_size": config.dim, "patch_size": values["patch_size"], "qk_norm": True, "qkv_bias": False}
        named = {name: settings[name] for name in settings if action.enable_mouse or not name.startswith("mouse_")}
        shared["action_config"] = named | fixed
    if names == "official":
        fixed = {"_class_name": "CausalWanModel", "model_type": "i2v", "qk_norm": True, "cross_attn_norm": True}
        sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "eps")
        return fixed | {name: values[name] for name in sizes} | shared
    everywhere = action is None or len(action.blocks) == config.num_layers
    return {  # the port's bidirectional class has an action module in every block
        "_class_name": "MatrixGame2WanModel" if everywhere else "CausalMatrixGame2WanModel",
        **{name: values[ours] for name, ours in DIFFUSERS_SETTINGS.items()},
        "attention_head_dim": config.dim // config.num_heads,
        "text_dim": 0,
        "num_frames_per_block": causal.block if causal else 3,
        **shared,
    }
