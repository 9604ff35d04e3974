"""Images on their way into the model: as pixels, as CLIP tokens, and as the latents that condition a rollout."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Size, Tensor, nn

from configs import build_from, storage
from configs.errors import UserError
from configs.files import sha256_file
from configs.foreign import reading
from model.foreign import load_foreign, read_json
from model.inputs import with_mask
from model.limits import MANY, WIDE, require_between
from model.weights import LazyWeights, lazily, require_same_tensors

if TYPE_CHECKING:
    from model.codec import Codec

Vision = Literal["tokens", "pooled", "none"]  # ActionDiTConfig.vision

# Of CLIP's training pictures in [0, 1] (open_clip, OPENAI_DATASET_MEAN and _STD).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

VISUAL_PREFIX, HF_PREFIX = "visual.", "vision_model."
HF_CONFIG, HF_WEIGHTS = "config.json", "model.safetensors"
NEEDS_TRANSFORMERS = "CLIP tokens need transformers: pip install 'transformers>=4.57'"

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


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of a CLIP vision tower; the defaults are those of Wan's, open-clip xlm-roberta-large-vit-huge-14."""

    image_size: int = 224  # px, each way
    patch_size: int = 14  # px
    width: int = 1280
    mlp_width: int = 5120
    heads: int = 16
    layers: int = 31  # the last of its 32 is not used
    eps: float = 1e-5

    def __post_init__(self) -> None:
        require_between("vision.", 1, MANY, image_size=self.image_size, heads=self.heads, layers=self.layers)
        require_between("vision.", 1, self.image_size, patch_size=self.patch_size)
        require_between("vision.", 1, WIDE, width=self.width, mlp_width=self.mlp_width)
        if self.width % self.heads:
            raise UserError(f"vision.width={self.width} must be a multiple of vision.heads={self.heads}")


class VisionTower(nn.Module):
    """CLIP's vision tower up to its last but one layer."""

    def __init__(self, config: TowerConfig, tower: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (b 257 1280), the class token first, of `images` (b 3 h w) in [-1, 1]."""
        pixels = clip_pixels(images, self.config.image_size)
        return self.tower(pixel_values=pixels.to(next(self.tower.parameters()).dtype)).last_hidden_state


def visual_context(tower: VisionTower | None, images: Tensor, vision: Vision) -> Tensor | None:
    """What a model with `vision` is told of `images` (b 3 h w) in [-1, 1]: tokens (b 257 1280), one (b 1 1280), None.

    The one is CLIP's own pooling, its class token, at the same layer as the tokens.
    """
    if vision == "none":
        return None
    if tower is None:
        raise UserError(f"a model with vision {vision!r} needs the weights of CLIP's vision tower; give their path")
    tokens = tower(images)
    return tokens[:, :1] if vision == "pooled" else tokens


def load_vision(path: str | Path) -> VisionTower:
    """The tower in the official open-clip file, or in a file or folder of transformers' CLIP; in eval mode on the CPU.

    A folder holds model.safetensors and config.json, whose sizes count. Text towers and unused layers are left out.
    Raises in one line: transformers not installed, no such file, one with code in it, names or shapes that do not fit.
    """
    path = storage.local(path)
    config = _read_hf_config(path / HF_CONFIG) if path.is_dir() else TowerConfig()
    weights = path / HF_WEIGHTS if path.is_dir() else path
    return load_tower(load_foreign(weights), config, str(weights))


def vision_hash(path: str | Path) -> str:
    """Twelve hex digits over the tower's weights file: tokens of one tower mean nothing to another."""
    path = storage.local(path)
    return sha256_file(path / HF_WEIGHTS if path.is_dir() else path)[:12]


def load_tower(state: Mapping[str, Tensor], config: TowerConfig, source: str) -> VisionTower:
    """The tower of `config` with the tensors of `state` in the official or in transformers' layout, float32.

    The last layer and more may be there beyond `config.layers`. `source` names the tensors in errors.
    """
    with torch.device("meta"):  # no memory and no random numbers for weights that the state replaces
        tower = _make_tower(config)
    own = {name: tensor for name, tensor in tower.state_dict().items() if "position_ids" not in name}
    converted = _convert(state, own, config, source)
    tower.to_empty(device="cpu")
    embeddings: Any = tower.embeddings
    embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[-1]))
    tower.load_state_dict(converted, strict=False)  # position_ids are a stored buffer in older versions
    return VisionTower(config, tower).eval()


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """`images` (b 3 h w) in [-1, 1] as CLIP sees them (b 3 `size` `size`): bicubic without antialias, as upstream."""
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (rearrange(resized.new_tensor(one), "c -> c 1 1") for one in (CLIP_MEAN, CLIP_STD))
    return (resized * 0.5 + 0.5 - mean) / std


@torch.no_grad()
def image_conditions(codec: "Codec", image: Tensor, latents: int) -> Iterator[Tensor]:
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


def preprocess_image(image: Image.Image, height: int, width: int) -> Tensor:
    """The image as (3 h w) float32 in [-1, 1]: centre crop to the aspect of `height` x `width` px, then resized.

    PIL's antialiased bilinear resize, and its rounding of a crop box that falls between pixels, as upstream.
    """
    image = image.convert("RGB")
    w, h = image.size
    if h / w > height / width:
        kept_w, kept_h = w, int(w * height / width)
    else:
        kept_w, kept_h = int(h * width / height), h
    if kept_w < 1 or kept_h < 1:
        raise UserError(f"an image of {w}x{h} px has no {width}:{height} part; give one nearer to that shape")
    image = image.crop(((w - kept_w) / 2, (h - kept_h) / 2, (w + kept_w) / 2, (h + kept_h) / 2))  # pyright: ignore[reportArgumentType]
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return rearrange(pixels, "h w c -> c h w") * 2 - 1


def _make_tower(config: TowerConfig) -> nn.Module:
    transformers = _transformers()
    sizes = transformers.CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act="gelu",  # the exact one
        layer_norm_eps=config.eps,
    )
    model = transformers.CLIPVisionModel(sizes)
    tower = model.vision_model if hasattr(model, "vision_model") else model  # transformers 4 has the tower one deeper
    tower.post_layernorm = nn.Identity()
    return tower


def _convert(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], config: TowerConfig, source: str
) -> dict[str, Tensor]:
    """The tensors of `own` names from a `state` of either layout; raises ValueError that names what does not fit."""
    fault, given = f"{source} holds no such CLIP vision tower", lazily(state)
    if not any(re.search(r"(^|\.)cls_embedding$", name) for name in given):
        given = _strip(given, HF_PREFIX, HF_UNUSED, "encoder.layers.", config.layers)
        require_same_tensors(own, given.specs, fault)
        return dict(given)
    given = _strip(given, VISUAL_PREFIX, OFFICIAL_UNUSED, "transformer.", config.layers)
    expected = {_official_name(name): _official_like(name, tensor) for name, tensor in own.items()}
    require_same_tensors(expected, given.specs, fault)
    return {name: _take(given[_official_name(name)], name, tensor.shape) for name, tensor in own.items()}


def _strip(state: LazyWeights, prefix: str, unused: tuple[str, ...], layers: str, kept: int) -> LazyWeights:
    """`state` without `prefix`, without what is unused and without the layers from number `kept` on."""
    short = {name: name.removeprefix(prefix) for name in state}
    beyond = re.compile(re.escape(layers) + r"(\d+)\.")

    def wanted(name: str) -> bool:
        layer = beyond.match(name)
        return not (name.startswith(unused) or name.endswith("position_ids") or (layer and int(layer[1]) >= kept))

    return state.renamed({name: bare for name, bare in short.items() if wanted(bare)})


def _official_name(name: str) -> str:
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _official_like(name: str, tensor: Tensor) -> Tensor:
    """A tensor of the shape that the official file gives to what transformers calls `name`."""
    if name.endswith("class_embedding"):
        return rearrange(tensor, "c -> 1 1 c")
    if "position_embedding" in name:
        return rearrange(tensor, "l c -> 1 l c")
    return torch.cat([tensor] * 3) if re.search(r"\.[qkv]_proj\.", name) else tensor


def _take(tensor: Tensor, name: str, shape: Size) -> Tensor:
    """The part of an official `tensor` that transformers calls `name`."""
    part = re.search(r"\.([qkv])_proj\.", name)
    return tensor.chunk(3)["qkv".index(part[1])] if part else tensor.reshape(shape)


def _read_hf_config(path: Path) -> TowerConfig:
    given, transformers = read_json(path), _transformers()
    with reading(path):
        # Knows the defaults that files leave out.
        sizes = transformers.CLIPVisionConfig.from_dict(given.get("vision_config", given))
    if "clip" not in str(given.get("model_type")) or sizes.hidden_act != "gelu":
        raise UserError(
            f"{path} describes a {given.get('model_type')} with {sizes.hidden_act}, not the CLIP vision tower of Wan, "
            "whose activation is gelu"
        )
    with reading(path):
        found = {
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "width": sizes.hidden_size,
            "mlp_width": sizes.intermediate_size,
            "heads": sizes.num_attention_heads,
            "layers": sizes.num_hidden_layers - 1,
            "eps": sizes.layer_norm_eps,
        }
    return build_from(TowerConfig, found, path)


def _transformers() -> Any:
    """The library, imported when something is to be made with it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(NEEDS_TRANSFORMERS) from error
    return transformers
