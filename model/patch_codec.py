"""The demo's codec: a closed-form linear encoder and a learned decoder, so that latents exist in seconds.

The encoder is a PCA of 4 x 8 x 8 patches. The decoder starts at the PCA's own reconstruction and adds what convolutions
with a memory of earlier latents can add. Fitted by `python -m train codec`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from configs import within
from configs.errors import MissingFileError, UserError
from model.limits import MANY, WIDE
from model.video_codec import Codec
from model.weights import load_into, open_weights

SPATIAL = 8  # pixels per latent, each way
TEMPORAL = 4  # frames per latent, after the first
PATCHES = "b f h w (c t y x)"
WEIGHTS_FILE = "model.safetensors"

State = list[Tensor]  # the newest features (b c h w) of each memory block: what the next latents need of the past


@dataclass(frozen=True)
class PatchCodecConfig:
    """Sizes of the demo's codec."""

    spatial: ClassVar[int] = SPATIAL
    temporal: ClassVar[int] = TEMPORAL
    name: Literal["patch"] = "patch"
    channels: int = within(1, 3 * TEMPORAL * SPATIAL * SPATIAL, 16)  # of the latents
    width: int = within(1, WIDE, 128)  # features at latent resolution
    fine_width: int = within(1, WIDE, 64)  # features at half the pixel resolution
    memory_blocks: int = within(0, MANY, 3)  # residual blocks at latent resolution, each seeing one latent further back
    fine_blocks: int = within(0, MANY, 2)  # residual blocks at half the pixel resolution
    # Normalised channels have the standard deviation variance ** whitening: 0 all alike, 0.5 as in the picture. Near
    # 0.5 the model's loss is the picture's; near 0 it is mostly texture that no action predicts (docs/lab_notes.md).
    whitening: float = 0.5


class MemoryBlock(nn.Module):
    """A residual block over one latent frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """(b f c h w) and the features (b c h w) before it, or None at the start -> (b f c h w) and its own last."""
        first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
        both = torch.cat([x, torch.cat([first, x[:, :-1]], dim=1)], dim=2)
        y = self.out(functional.silu(self.mix(functional.silu(rearrange(both, "b f c h w -> (b f) c h w")))))
        return x + rearrange(y, "(b f) c h w -> b f c h w", f=x.shape[1]), x[:, -1]


class FineBlock(nn.Module):
    """A residual block within one latent's frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(functional.silu(self.mix(functional.silu(x))))


class PatchCodec(Codec):
    """Linear encoder from a PCA, learned residual decoder."""

    Config = PatchCodecConfig

    basis: Tensor
    centre: Tensor

    def __init__(self, config: PatchCodecConfig) -> None:
        super().__init__()
        self.config = config
        patch = 3 * TEMPORAL * SPATIAL * SPATIAL
        self.register_buffer("basis", torch.zeros(config.channels, patch))  # orthonormal rows
        self.register_buffer("centre", torch.zeros(patch))
        self.register_buffer("latent_mean", torch.zeros(config.channels))
        self.register_buffer("latent_std", torch.ones(config.channels))
        pixels = 3 * TEMPORAL * 4  # one position at half resolution: four frames of 2 x 2 pixels
        self.enter = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.memory = nn.ModuleList(MemoryBlock(config.width) for _ in range(config.memory_blocks))
        self.widen = nn.Conv2d(config.width, config.fine_width * 16, 1)
        self.look = nn.Conv2d(pixels, config.fine_width, 3, padding=1)
        self.fine = nn.ModuleList(FineBlock(config.fine_width) for _ in range(config.fine_blocks))
        self.leave = nn.Conv2d(config.fine_width, pixels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)  # training starts at the PCA's reconstruction and never below it
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    @classmethod
    def weight_files(cls, config: PatchCodecConfig) -> dict[str, str]:
        return {"": WEIGHTS_FILE}

    @classmethod
    def load(cls, config: PatchCodecConfig, folder: Path) -> Self:
        file = folder / WEIGHTS_FILE
        if not file.is_file():
            raise MissingFileError(f"no codec in {folder} ({file.name} is missing); fit one with python -m train codec")
        codec = cls(config)
        load_into(codec, open_weights(file))
        if not (codec.latent_std > 0).all():
            raise UserError(f"{file} is damaged: its latents have no spread (latent_std); fit it again")
        return codec

    def encode_stream(self, video: Tensor, state: State | None) -> tuple[Tensor, State]:
        # The first frame is repeated four times, so that one set of weights serves it too.
        self.require_whole_latents(video, state)
        lead = int(state is None)
        first = repeat(video[:, :, :lead], "b c n h w -> b c (n t) h w", t=TEMPORAL)
        raw = (to_patches(torch.cat([first, video[:, :, lead:]], dim=2)) - self.centre) @ self.basis.T
        return rearrange((raw - self.latent_mean) / self.latent_std, "b f h w c -> b c f h w"), []

    def decode_stream(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Not clamped, so that training sees a gradient everywhere."""
        linear = self.linear_decode(latents)
        coarse = rearrange(latents, "b c f h w -> (b f) c h w").to(self.enter.weight.dtype)
        x = rearrange(self.enter(coarse), "(b f) c h w -> b f c h w", f=latents.shape[2])
        following = []
        for i, block in enumerate(self.memory):
            x, newest = block(x, None if state is None else state[i])
            following.append(newest)
        x = functional.pixel_shuffle(self.widen(rearrange(x, "b f c h w -> (b f) c h w")), 4)
        pixels = rearrange(linear, "b c (f t) (h y) (w x) -> (b f) (c t y x) h w", t=TEMPORAL, y=2, x=2)
        x = x + self.look(pixels)
        for block in self.fine:
            x = block(x)
        added = rearrange(
            self.leave(functional.silu(x)),
            "(b f) (c t y x) h w -> b c (f t) (h y) (w x)",
            b=len(latents), t=TEMPORAL, y=2, x=2,
        )  # fmt: skip
        video = linear + added.to(linear.dtype)
        if state is None:
            first = video[:, :, :TEMPORAL].mean(dim=2, keepdim=True)
            video = torch.cat([first, video[:, :, TEMPORAL:]], dim=2)
        return video, following

    def linear_decode(self, latents: Tensor) -> Tensor:
        """The PCA's own reconstruction (b 3 4f h w), four frames for the first latent too."""
        raw = rearrange(latents, "b c f h w -> b f h w c").float() * self.latent_std + self.latent_mean
        return from_patches(raw @ self.basis + self.centre)

    @torch.no_grad()
    def fit_pca(self, patches: Tensor) -> Tensor:
        """Sets encoder and latent statistics from `patches` (m 768) in [-1, 1]; returns the variance kept, in [0, 1].

        The normalised channels have standard deviations of variance ** `whitening` and a mean square of 1.
        """
        centre = patches.mean(dim=0)
        centred = (patches - centre).double()
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
        variances, vectors = variances.flip(0), vectors.flip(1)
        kept = variances[: self.config.channels].clamp_min(1e-12)
        normalised_std = kept**self.config.whitening
        normalised_std = normalised_std / normalised_std.square().mean().sqrt()
        self.centre.copy_(centre)
        self.basis.copy_(vectors[:, : self.config.channels].T)
        self.latent_mean.zero_()
        self.latent_std.copy_(kept.sqrt() / normalised_std)
        return kept.sum() / variances.sum()


def to_patches(video: Tensor) -> Tensor:
    """(b 3 4f 8h 8w) -> (b f h w 768), one row per latent position."""
    return rearrange(video, f"b c (f t) (h y) (w x) -> {PATCHES}", t=TEMPORAL, y=SPATIAL, x=SPATIAL)


def from_patches(patches: Tensor) -> Tensor:
    """(b f h w 768) -> (b 3 4f 8h 8w)."""
    return rearrange(patches, f"{PATCHES} -> b c (f t) (h y) (w x)", t=TEMPORAL, y=SPATIAL, x=SPATIAL)
