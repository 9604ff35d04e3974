"""The Wan 2.1 autoencoder behind the codec's interface: the networks of diffusers, fed piece by piece.

Every causal convolution keeps the last two frames that it saw. The lists of those frames are the state of a stream, so
a clip of any length is encoded and decoded in the memory of one piece, and in pieces it gives what it gives whole. The
first frame passes alone and becomes the first latent; every later latent stands for four frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from configs import to_dict, within
from configs.errors import UserError
from model.limits import MANY
from model.third_party import diffusers_names, load_third_party, read_json
from model.tiny_decoder import TinyDecoder, load_tiny_decoder
from model.video_codec import Codec
from model.weights import require_same_tensors

DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

# Our name of a setting in diffusers' config.json.
DIFFUSERS_SETTINGS = {
    "base_dim": "width", "z_dim": "channels", "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temperal_downsample", "latents_mean": "latent_mean", "latents_std": "latent_std",
}  # fmt: skip

# Statistics of Wan 2.1's latents, per channel: those with which its DiT and Matrix-Game's were trained.
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

WanState = list[Any]  # per convolution its last frames (b c 2 h w), None before the first; diffusers marks one as "Rep"


@dataclass(frozen=True)
class WanCodecConfig:
    """Sizes of the autoencoder (the released one's by default), where its weights are and how it is run."""

    name: Literal["wan"] = "wan"
    weights: str = "Wan2.1_VAE.pth"  # official or diffusers key names; relative to the folder of this config
    decoder: Literal["full", "tiny"] = "full"  # tiny: TAEHV's, a fraction of the work, for live use
    tiny_weights: str = "taew2_1.pth"  # read for the tiny decoder only; relative as above
    # Latents that pass through the networks at once: more take more memory and less overhead.
    piece_latents: int = within(1, MANY, 3)
    width: int = within(1, MANY, 96)  # features at pixel resolution
    channels: int = within(1, MANY, 16)  # of the latents
    dim_mult: tuple[int, ...] = within(1, 64, (1, 2, 4, 4))  # of the width, one per level
    num_res_blocks: int = within(0, 64, 2)
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # spelt so upstream; at the end of each level but one
    latent_mean: tuple[float, ...] = MEAN
    latent_std: tuple[float, ...] = within(1e-6, 1e6, STD)

    def __post_init__(self) -> None:
        if not 1 <= len(self.dim_mult) <= 8:
            raise UserError(f"dim_mult={list(self.dim_mult)} must be 1 to 8 numbers")
        if not len(self.latent_mean) == len(self.latent_std) == self.channels:
            raise UserError(f"latent_mean and latent_std need {self.channels} values each, one per channel")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise UserError(f"temperal_downsample needs {len(self.dim_mult) - 1} values, one less than dim_mult")

    @property
    def spatial(self) -> int:
        """Pixels per latent, each way."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal(self) -> int:
        """Frames per latent, after the first."""
        return 2 ** sum(self.temperal_downsample)


class WanCodec(Codec):
    """Encoder and decoder of `AutoencoderKLWan`, or its encoder and the tiny decoder."""

    Config = WanCodecConfig

    def __init__(self, config: WanCodecConfig, vae: Any, tiny: TinyDecoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder: Any = vae.encoder
        self.quant_conv: Any = vae.quant_conv
        self.decoder: Any = None if tiny else vae.decoder
        self.post_quant_conv: Any = None if tiny else vae.post_quant_conv
        self.tiny = tiny
        self.register_buffer("latent_mean", torch.tensor(config.latent_mean), persistent=False)
        self.register_buffer("latent_std", torch.tensor(config.latent_std), persistent=False)

    @classmethod
    def third_party_settings(cls, path: Path) -> tuple[dict[str, Any], Path] | None:
        """Wan's official weights file, or a folder in the diffusers layout."""
        if path.is_file():
            return {"weights": path.name}, path
        described = path / DIFFUSERS_CONFIG
        if not described.is_file():
            return None
        return {"weights": DIFFUSERS_WEIGHTS, **_read_diffusers_config(described)}, described

    @classmethod
    def weight_files(cls, config: WanCodecConfig) -> dict[str, str]:
        return {"weights": config.weights, "tiny_weights": config.tiny_weights}

    @classmethod
    def load(cls, config: WanCodecConfig, folder: Path) -> Self:
        tiny = load_tiny_decoder(folder / config.tiny_weights) if config.decoder == "tiny" else None
        return cls(config, load_vae(config, folder / config.weights), tiny)

    def encode_stream(self, video: Tensor, state: WanState | None) -> tuple[Tensor, WanState]:
        """The means, not samples, float32, as upstream."""
        self.require_whole_latents(video, state)
        cache = [None] * _count_convolutions(self.encoder) if state is None else list(state)
        means = []
        frames = self.config.temporal * self.config.piece_latents
        for piece in _pieces(video.to(self.quant_conv.weight.dtype), int(state is None), frames):
            moments = self.quant_conv(self.encoder(piece, feat_cache=cache, feat_idx=[0]))
            means.append(moments.chunk(2, dim=1)[0].float())
        mean, std = self._statistics()
        return (torch.cat(means, dim=2) - mean) / std, cache

    def decode(self, latents: Tensor) -> Tensor:
        videos, state = [], None
        for piece in latents.split(self.config.piece_latents, dim=2):
            video, state = self.decode_stream(piece, state)
            videos.append(video.clamp(-1, 1))
        return torch.cat(videos, dim=2)

    def decode_stream(self, latents: Tensor, state: WanState | None) -> tuple[Tensor, WanState]:
        if self.tiny is not None:
            return self.tiny.decode_stream(latents, state)
        mean, std = self._statistics()
        x = self.post_quant_conv((latents.float() * std + mean).to(self.post_quant_conv.weight.dtype))
        cache = [None] * _count_convolutions(self.decoder) if state is None else list(state)
        videos = []
        for piece in _pieces(x, int(state is None), self.config.piece_latents):
            videos.append(self.decoder(piece, feat_cache=cache, feat_idx=[0]).float())
        return torch.cat(videos, dim=2), cache

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, std = (rearrange(values.float(), "c -> c 1 1 1") for values in (self.latent_mean, self.latent_std))
        return mean, std


def load_vae(config: WanCodecConfig, weights: str | Path) -> Any:
    """diffusers' AutoencoderKLWan, float32, with the tensors of a file in the official or the diffusers layout."""
    with torch.device("meta"):  # no memory and no random numbers for weights that the file replaces
        vae = make_vae(config)
    state = load_third_party(weights)
    if "encoder.conv1.weight" in state:
        state = state.renamed(diffusers_names("vae", state))
    require_same_tensors(vae.state_dict(), state.specs, f"{weights} is no Wan 2.1 autoencoder of width {config.width}")
    vae.to_empty(device="cpu")
    vae.load_state_dict(state)
    return vae


def make_vae(config: WanCodecConfig) -> Any:
    """diffusers' AutoencoderKLWan with random weights."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan  # slow: not for every command

    settings = to_dict(config)
    return AutoencoderKLWan(**{name: settings[ours] for name, ours in DIFFUSERS_SETTINGS.items()})


def _read_diffusers_config(path: Path) -> dict[str, Any]:
    """Our settings of a diffusers config.json; refuses another autoencoder than Wan 2.1's."""
    given = read_json(path)
    others = {name: given[name] for name in ("is_residual", "patch_size", "attn_scales") if given.get(name)}
    if given.get("_class_name") != "AutoencoderKLWan" or others:
        raise UserError(f"{path}: {given.get('_class_name')} {others or ''} is not Wan 2.1's AutoencoderKLWan")
    return {ours: given[name] for name, ours in DIFFUSERS_SETTINGS.items() if name in given}


def _count_convolutions(network: nn.Module) -> int:
    """At least as many places as the network's causal convolutions need."""
    return sum(isinstance(module, nn.Conv3d) for module in network.modules())


def _pieces(x: Tensor, lead: int, size: int) -> Iterator[Tensor]:
    """`x` (b c n h w) along n: the first `lead`, if any, then pieces of up to `size`."""
    if lead:
        yield x[:, :, :lead]
    if x.shape[2] > lead:
        yield from x[:, :, lead:].split(size, dim=2)
