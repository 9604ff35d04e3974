"""The settings of a model: what a YAML file of configs/models holds."""

from dataclasses import dataclass, field
from typing import Literal

from configs import within
from configs.errors import UserError
from model.actions import ActionConfig
from model.attention import AttentionBackend
from model.flow import FlowMatchConfig
from model.limits import MANY, WIDE
from model.masks import CausalConfig

Vision = Literal["tokens", "pooled", "none"]  # CLIP tokens (b 257 c), one pooled (b 1 c), or no such input


@dataclass(frozen=True)
class ActionDiTConfig:
    """Every size of the model; names as in the official config.json where it has them."""

    dim: int = within(1, WIDE)
    ffn_dim: int = within(1, WIDE)
    num_heads: int = within(1, MANY)
    num_layers: int = within(1, MANY)
    action: ActionConfig | None = None
    in_dim: int = within(1, WIDE, 36)  # noisy latents ++ 4 mask channels ++ conditioning latents
    out_dim: int = within(1, WIDE, 16)  # latent channels
    freq_dim: int = within(1, WIDE, 256)  # of the time sinusoid
    patch_size: tuple[int, int, int] = within(1, 64, (1, 2, 2))  # latent frames, rows, columns
    eps: float = within(0, 1, 1e-6)
    rope_theta: tuple[float, float, float] = within(1e-3, 1e9, (10000.0, 10000.0, 10000.0))  # of time, rows, columns
    borders: int = within(0, WIDE, 0)  # ours: channels of convolutions that mend the velocity across patches; 0: none
    vision: Vision = "tokens"
    img_dim: int = within(1, WIDE, 1280)  # channels of the CLIP tokens
    causal: CausalConfig | None = None  # a model that sees the past alone and can stream; None: all frames at once
    attention: AttentionBackend = "sdpa"  # of the video's self- and cross-attention; `dense` suits bf16 on a CPU
    checkpoint_every: int = within(0, MANY, 0)  # activation checkpointing: 0 off, 1 every block, n every n-th

    def __post_init__(self) -> None:
        if self.patch_size[0] != 1:
            raise UserError(f"model.patch_size={list(self.patch_size)} must begin with 1, a single latent frame")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.dim // self.num_heads < 6:
            raise UserError(f"dim {self.dim} must be num_heads {self.num_heads} x an even number of at least 6")
        if self.freq_dim % 2:
            raise UserError(f"model.freq_dim={self.freq_dim} must be even")
        outside = [i for i in self.action.blocks if not 0 <= i < self.num_layers] if self.action else []
        if outside:
            raise UserError(f"action.blocks names {outside}, but the blocks are 0 to {self.num_layers - 1}")


@dataclass(frozen=True)
class ModelConfig:
    """A model and the flow that it is trained and sampled with."""

    model: ActionDiTConfig
    flow: FlowMatchConfig = field(default_factory=FlowMatchConfig)
