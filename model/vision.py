"""The first image of a rollout on its way into the model: as CLIP tokens, and as latents that condition it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Size, Tensor, nn

from configs import storage
from configs.errors import UserError
from configs.untrusted import reading
from model.config import Vision
from model.inputs import with_mask
from model.limits import MANY, WIDE, require_between
from model.third_party import load_third_party, read_json
from model.video_codec import Codec
from model.weights import LazyWeights, lazily, require_same_tensors

# Of CLIP's training pictures in [0, 1] (open_clip, OPENAI_DATASET_MEAN and _STD).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Sizes of Wan's tower, open-clip xlm-roberta-large-vit-huge-14, by transformers' names.
# The last of its 32 layers is not used; gelu is the exact one; sizes are in px.
WAN_TOWER: dict[str, Any] = {
    "image_size": 224, "patch_size": 14, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16,
    "num_hidden_layers": 31, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
}  # fmt: skip

VISUAL_PREFIX, HF_PREFIX = "visual.", "vision_model."
HF_CONFIG, HF_WEIGHTS = "config.json", "model.safetensors"

# In either layout, what Matrix-Game does not use: text tower, the norm and projection after the last layer.
OFFICIAL_UNUSED = ("post_norm.", "head", "textual.", "log_scale")
HF_UNUSED = ("post_layernorm.", "text_model.", "visual_projection.", "text_projection.", "logit_scale")
# Names of the official file for those of transformers; q, k and v are one tensor there.
OFFICIAL_NAMES = (
    (r"^embeddings\.class_embedding$", "cls_embedding"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embedding"),
    (r"^embeddings\.patch_embedding\.", "patch_embedding."),
    (r"^pre_layrnorm\.", "pre_norm."),
    (r"^encoder\.layers\.", "transformer."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.to_qkv."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)

QKV = re.compile(r"\.([qkv])_proj\.")


class VisionTower(nn.Module):
    """CLIP's vision tower up to its last but one layer."""

    def __init__(self, tower: nn.Module, image_size: int) -> None:
        super().__init__()
        self.tower, self.image_size = tower, image_size

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (b 257 1280), the class token first, of `images` (b 3 h w) in [-1, 1]."""
        pixels = clip_pixels(images, self.image_size)
        return self.tower(pixel_values=pixels.to(next(self.tower.parameters()).dtype)).last_hidden_state


def image_tokens(tower: VisionTower | None, images: Tensor, vision: Vision) -> Tensor | None:
    """What a model with `vision` gets of `images` (b 3 h w) in [-1, 1]: tokens (b 257 1280), the class token (b 1 1280)
    or None."""
    if vision == "none":
        return None
    if tower is None:
        raise UserError(f"a model with vision {vision!r} needs the weights of CLIP's vision tower; give their path")
    tokens = tower(images)
    return tokens[:, :1] if vision == "pooled" else tokens


def load_vision(path: str | Path) -> VisionTower:
    """The tower in the official open-clip file, or in a file or folder of transformers' CLIP; in eval mode on the CPU.

    A folder holds model.safetensors and config.json with the sizes. Text towers and unused layers are left out.
    """
    local = storage.local(path)
    if not local.is_dir():
        return load_tower(load_third_party(local), WAN_TOWER, str(local))
    sizes, weights = _read_sizes(local / HF_CONFIG), local / HF_WEIGHTS
    return load_tower(load_third_party(weights), sizes, str(weights))


def vision_hash(path: str | Path) -> str:
    """Twelve hex digits over the tower's weights file: tokens of one tower mean nothing to another."""
    local = storage.local(path)
    return storage.sha256(local / HF_WEIGHTS if local.is_dir() else local)[:12]


def load_tower(state: Mapping[str, Tensor], sizes: Mapping[str, Any], source: str) -> VisionTower:
    """The tower of `sizes` (see WAN_TOWER) with the tensors of `state` in the official or in transformers' layout.

    `state` may hold more layers than `sizes`. `source` names it in errors.
    """
    with torch.device("meta"):  # no memory and no random numbers for weights that the state replaces
        tower = make_tower(sizes)
    own = {name: tensor for name, tensor in tower.state_dict().items() if "position_ids" not in name}
    converted = _convert(state, own, sizes["num_hidden_layers"], f"{source} holds no such CLIP vision tower")
    tower.to_empty(device="cpu")
    embeddings: Any = tower.embeddings
    embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[-1]))
    tower.load_state_dict(converted, strict=False)  # position_ids are a stored buffer in older versions
    return VisionTower(tower, sizes["image_size"]).eval()


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """`images` (b 3 h w) in [-1, 1] as CLIP sees them (b 3 `size` `size`): bicubic without antialias, as upstream."""
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (rearrange(resized.new_tensor(one), "c -> c 1 1") for one in (CLIP_MEAN, CLIP_STD))
    return (resized * 0.5 + 0.5 - mean) / std


@torch.no_grad()
def image_conditions(codec: Codec, image: Tensor, latents: int) -> Iterator[Tensor]:
    """Matrix-Game's conditioning of a rollout from `image` (b 3 h w) in [-1, 1]: blocks (b 4+c `latents` h/8 w/8).

    Four mask channels, 1 at the first latent of the first block only, then the latents of a clip that begins with the
    image and goes on in grey. Without an end, in the memory of one block: the codec's encoder streams. The first block
    of f latents is the whole conditioning of a clip of f latents.
    """
    temporal = codec.config.temporal
    grey = torch.zeros_like(image)[:, :, None].expand(-1, -1, temporal * latents, -1, -1)
    state, video = None, torch.cat([image[:, :, None], grey[:, :, : temporal * (latents - 1)]], dim=2)
    while True:
        first = state is None
        encoded, state = codec.encode_stream(video, state)
        yield with_mask(encoded, known=int(first))
        video = grey


def make_tower(sizes: Mapping[str, Any]) -> nn.Module:
    """transformers' tower of these `sizes` (see WAN_TOWER), without the norm after its last layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel  # slow: not for every command

    model: Any = CLIPVisionModel(CLIPVisionConfig(**sizes))
    tower = model.vision_model if hasattr(model, "vision_model") else model  # transformers 4 has the tower one deeper
    tower.post_layernorm = nn.Identity()
    return tower


def _convert(state: Mapping[str, Tensor], own: Mapping[str, Tensor], layers: int, fault: str) -> dict[str, Tensor]:
    """The tensors of `own` from a `state` of either layout; a UserError `fault` names what does not fit."""
    given = lazily(state)
    if not any(re.search(r"(^|\.)cls_embedding$", name) for name in given):
        given = _select(given, HF_PREFIX, HF_UNUSED, "encoder.layers.", layers)
        require_same_tensors(own, given.specs, fault)
        return dict(given)
    given = _select(given, VISUAL_PREFIX, OFFICIAL_UNUSED, "transformer.", layers)
    expected = {official_name(name): _official_like(name, tensor) for name, tensor in own.items()}
    require_same_tensors(expected, given.specs, fault)
    return {name: _take(given[official_name(name)], name, tensor.shape) for name, tensor in own.items()}


def _select(state: LazyWeights, prefix: str, unused: tuple[str, ...], layers: str, kept: int) -> LazyWeights:
    """`state` without the `prefix` of its names, the `unused` tensors and the layers from number `kept` on."""
    short = {name: name.removeprefix(prefix) for name in state}
    numbered = re.compile(re.escape(layers) + r"(\d+)\.")

    def wanted(name: str) -> bool:
        layer = numbered.match(name)
        return not (name.startswith(unused) or name.endswith("position_ids") or (layer and int(layer[1]) >= kept))

    return state.renamed({name: bare for name, bare in short.items() if wanted(bare)})


def official_name(name: str) -> str:
    """The name in the official file of the tensor that transformers calls `name`."""
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _official_like(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the shape that the official file gives to what transformers calls `name`."""
    if "class_embedding" in name or "position_embedding" in name:
        return tensor.reshape(1, -1, tensor.shape[-1])
    return torch.cat([tensor] * 3) if QKV.search(name) else tensor


def _take(tensor: Tensor, name: str, shape: Size) -> Tensor:
    """The part of an official `tensor` that transformers calls `name`."""
    part = QKV.search(name)
    return tensor.chunk(3)["qkv".index(part[1])] if part else tensor.reshape(shape)


def _read_sizes(path: Path) -> dict[str, Any]:
    """The sizes (see WAN_TOWER) in transformers' config.json, without the last layer."""
    from transformers import CLIPVisionConfig

    given, defaults = read_json(path), CLIPVisionConfig()
    with reading(path):
        vision = given.get("vision_config", given)
        sizes = {name: vision.get(name, getattr(defaults, name)) for name in WAN_TOWER}
        if "clip" not in str(given.get("model_type")) or sizes["hidden_act"] != "gelu":
            raise UserError(
                f"{path}: {given.get('model_type')} with {sizes['hidden_act']} is no CLIP with gelu, as Wan's"
            )
        sizes["num_hidden_layers"] -= 1
        widest = {"hidden_size": WIDE, "intermediate_size": WIDE, "patch_size": sizes["image_size"]}
        for name in sizes.keys() - {"hidden_act", "layer_norm_eps"}:
            if type(sizes[name]) is not int:
                raise UserError(f"{name}={sizes[name]!r:.80} must be a whole number")
            require_between("", 1, widest.get(name, MANY), **{name: sizes[name]})
        require_between("", 0, 1, layer_norm_eps=sizes["layer_norm_eps"])
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise UserError(f"hidden_size={sizes['hidden_size']} must be a multiple of num_attention_heads")
    return sizes
