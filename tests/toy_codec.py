"""A codec as a user would add one: this file, and a line in CODECS (tests/test_codec.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from einops import reduce, repeat
from torch import Tensor

from model.video_codec import Codec


@dataclass(frozen=True)
class ToyCodecConfig:
    name: Literal["toy"] = "toy"
    channels: int = 3
    spatial: int = 16
    temporal: int = 2


class ToyCodec(Codec):
    """Latents are the mean colours of 16 x 16 pixels over two frames."""

    Config = ToyCodecConfig

    def __init__(self, config: ToyCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("latent_mean", torch.zeros(3))
        self.register_buffer("latent_std", torch.ones(3))

    def encode_stream(self, video: Tensor, state: Any) -> tuple[Tensor, Any]:
        first = video[:, :, :1].expand(-1, -1, 1 if state is None else 0, -1, -1)
        return reduce(torch.cat([first, video], 2), "b c (f t) (h y) (w x) -> b c f h w", "mean", t=2, y=16, x=16), True

    def decode_stream(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        video = repeat(latents, "b c f h w -> b c (f t) (h y) (w x)", t=2, y=16, x=16)
        return video[:, :, 1 if state is None else 0 :], True

    @classmethod
    def weight_files(cls, config: ToyCodecConfig) -> dict[str, str]:
        return {"": "toy.txt"}

    @classmethod
    def load(cls, config: ToyCodecConfig, folder: Path) -> Self:
        return cls(config)
