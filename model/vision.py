"""The first image of a rollout on its way into the model: as CLIP tokens, and as latents that condition it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs import build_from, storage, within
from configs.errors import UserError
from configs.untrusted import reading
from model.config import Vision
from model.inputs import with_mask
from model.limits import MANY, WIDE
from model.third_party import load_third_party, read_json
from model.video_codec import Codec
from model.weights import LazyWeights, lazily, require_same_tensors

# Of CLIP's training pictures in [0, 1] (open_clip, OPENAI_DATASET_MEAN and _STD).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

HF_CONFIG, HF_WEIGHTS = "config.json", "model.safetensors"
PREFIXES = re.compile(r"^(visual|vision_model)\.")  # of the tower's names, in the official file and in transformers'
LAYER = re.compile(r"(?:transformer|encoder\.layers)\.(\d+)\.")
# What Matrix-Game does not use, in either layout: the text tower, norm and projection after the last layer.
UNUSED = (
    "post_norm.", "head", "textual.", "log_scale", "post_layernorm.", "text_model.", "visual_projection.",
    "text_projection.", "logit_scale",
)  # fmt: skip
# transformers' names for those of the official file; there, q, k and v are one tensor.
NAMES = (
    (r"^cls_embedding$", "embeddings.class_embedding"),
    (r"^pos_embedding$", "embeddings.position_embedding.weight"),
    (r"^patch_embedding\.", "embeddings.patch_embedding."),
    (r"^pre_norm\.", "pre_layrnorm."),
    (r"^transformer\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of a tower by transformers' names; those of Wan's, open-clip xlm-roberta-large-vit-huge-14, by default."""

    image_size: int = within(1, MANY, 224)  # px
    patch_size: int = within(1, MANY, 14)  # px
    hidden_size: int = within(1, WIDE, 1280)
    intermediate_size: int = within(1, WIDE, 5120)
    num_attention_heads: int = within(1, MANY, 16)
    num_hidden_layers: int = within(1, MANY, 31)  # one less than in the file: its last layer is not used
    layer_norm_eps: float = within(0, 1, 1e-5)
    hidden_act: Literal["gelu"] = "gelu"  # the exact one

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.patch_size > self.image_size:
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"and patch_size={self.patch_size} at most image_size={self.image_size}"
            )


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
        return load_tower(load_third_party(local), TowerConfig(), str(local))
    config, weights = _read_config(local / HF_CONFIG), local / HF_WEIGHTS
    return load_tower(load_third_party(weights), config, str(weights))


def vision_hash(path: str | Path) -> str:
    """Twelve hex digits over the tower's weights file: tokens of one tower mean nothing to another."""
    local = storage.local(path)
    return storage.sha256(local / HF_WEIGHTS if local.is_dir() else local)[:12]


def load_tower(state: Mapping[str, Tensor], config: TowerConfig, source: str) -> VisionTower:
    """The tower of `config` with the tensors of `state` in the official or in transformers' layout.

    `state` may hold more layers than `config`. `source` names it in errors.
    """
    with torch.device("meta"):  # no memory and no random numbers for weights that the state replaces
        tower = make_tower(config)
    expected = {name: tensor for name, tensor in tower.state_dict().items() if "position_ids" not in name}
    weights = _select(lazily(state), config.num_hidden_layers)
    require_same_tensors(expected, to_transformers(weights.specs), f"{source} holds no such CLIP vision tower")
    tower.to_empty(device="cpu")
    embeddings: Any = tower.embeddings
    embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[-1]))
    tower.load_state_dict(to_transformers(weights), strict=False)  # position_ids are a stored buffer in older versions
    return VisionTower(tower, config.image_size).eval()


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """`images` (b 3 h w) in [-1, 1] as CLIP sees them (b 3 `size` `size`): bicubic without antialias, as upstream."""
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (rearrange(resized.new_tensor(values), "c -> c 1 1") for values in (CLIP_MEAN, CLIP_STD))
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


def make_tower(config: TowerConfig) -> nn.Module:
    """transformers' tower, without the norm after its last layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel  # slow: not for every command

    model: Any = CLIPVisionModel(CLIPVisionConfig(**asdict(config)))
    tower = model.vision_model if hasattr(model, "vision_model") else model  # transformers 4 has the tower one deeper
    tower.post_layernorm = nn.Identity()
    return tower


def _select(state: LazyWeights, layers: int) -> LazyWeights:
    """The tensors of the first `layers` layers and of what stands before them, without the prefix of their names."""

    def wanted(name: str) -> bool:
        layer = LAYER.match(name)
        return not (name.startswith(UNUSED) or name.endswith("position_ids") or (layer and int(layer[1]) >= layers))

    bare = {name: PREFIXES.sub("", name) for name in state}
    return state.renamed({name: short for name, short in bare.items() if wanted(short)})


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official file's `tensors` with the names and shapes of transformers; those of transformers stay."""
    converted = {}
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name == "embeddings.class_embedding":
            tensor = tensor.flatten()
        if name == "embeddings.position_embedding.weight":
            tensor = tensor.squeeze(0)
        if ".attn.to_qkv." in name:
            parts = zip("qkv", torch.atleast_1d(tensor).chunk(3), strict=False)
            converted |= {name.replace(".attn.to_qkv.", f".self_attn.{part}_proj."): rows for part, rows in parts}
        else:
            converted[name] = tensor
    return converted


def _read_config(path: Path) -> TowerConfig:
    """The sizes in transformers' config.json, without the last layer."""
    from transformers import CLIPVisionConfig

    given, defaults = read_json(path), CLIPVisionConfig()
    with reading(path):
        if "clip" not in str(given.get("model_type")):
            raise UserError(f"{path}: model_type={given.get('model_type')} is no CLIP, as Wan's")
        vision = given.get("vision_config", given)
        sizes = {size.name: vision.get(size.name, getattr(defaults, size.name)) for size in fields(TowerConfig)}
        return build_from(TowerConfig, sizes | {"num_hidden_layers": sizes["num_hidden_layers"] - 1}, path)
