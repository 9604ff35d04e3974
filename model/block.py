"""The blocks of ActionDiT and its head, under the official names."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from model.actions import ActionModule
from model.attention import AttentionBackend, attend
from model.config import ActionDiTConfig
from model.kv_cache import LayerPast, MaskOrCache, attend_along_time
from model.layers import RMSNorm, add_gated, modulate


class BlockContext(NamedTuple):
    """What all blocks are given besides the tokens, the image and their past."""

    modulation: Tensor  # (b g 6 d) float32, g = 1, or one per latent frame
    rotation: Tensor  # (f s 1 e) complex64, of the video tokens; f as in `attend_along_time`
    keyboard: Tensor | None  # (b f window k)
    mouse: Tensor | None  # (b f window 2)
    action_rotation: Tensor | None  # (f 1 e) complex64
    update_cache: bool  # the frames are appended to the caches


class Attention(nn.Module):
    """The projections of an attention over the whole width."""

    def __init__(self, config: ActionDiTConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.backend: AttentionBackend = config.attention
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def queries(self, x: Tensor) -> Tensor:
        """(b l a e) for tokens x (b l d)."""
        return rearrange(self.norm_q(self.q(x)), "b l (a e) -> b l a e", a=self.heads)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b m a e) each for tokens x (b m d)."""
        k, v = (rearrange(y, "b m (a e) -> b m a e", a=self.heads) for y in (self.norm_k(self.k(x)), self.v(x)))
        return k, v


class SelfAttention(Attention):
    """Attention of the video tokens to each other."""

    def forward(self, x: Tensor, rotation: Tensor, past: MaskOrCache, update_cache: bool) -> Tensor:
        """(b l d) for tokens x (b l d), placed and with a past as in `attend_along_time`."""
        parts = (self.queries(x), *self.keys_and_values(x))
        q, k, v = (rearrange(y, "b (f s) a e -> b f s a e", s=rotation.shape[1]) for y in parts)
        attended = attend_along_time((q, k, v), rotation, past, update_cache, self.backend)
        return self.o(rearrange(attended, "b f s a e -> b (f s) (a e)"))


class CrossAttention(Attention):
    """Attention of the video tokens to the image tokens."""

    def forward(self, x: Tensor, image_kv: tuple[Tensor, Tensor]) -> Tensor:
        """(b l d) for queries from x (b l d) to keys and values (b m a e)."""
        return self.o(rearrange(attend(self.queries(x), *image_kv, backend=self.backend), "b l a e -> b l (a e)"))


class Block(nn.Module):
    """Self-attention, cross-attention to the image, actions, feed-forward."""

    def __init__(self, config: ActionDiTConfig, index: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = self.cross_attn = None
        if config.vision != "none":
            self.norm3 = nn.LayerNorm(config.dim, config.eps)
            self.cross_attn = CrossAttention(config)
        action = config.action if config.action and index in config.action.blocks else None
        self.action_model = ActionModule(action, config.dim) if action else None
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self, x: Tensor, context: BlockContext, image: Tensor | tuple[Tensor, Tensor] | None, past: LayerPast
    ) -> Tensor:
        """Tokens (b l d) -> (b l d). `image` are the image tokens (b m d), or their keys and values (b m a e)."""
        modulation = (self.modulation.float()[:, None] + context.modulation).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(dim=2)
        y = modulate(x, shift1, scale1, self.eps)
        x = add_gated(x, gate1, self.self_attn(y, context.rotation, past.video, context.update_cache))
        if self.cross_attn is not None and self.norm3 is not None and image is not None:
            image_kv = self.cross_attn.keys_and_values(image) if isinstance(image, Tensor) else image
            x = x + self.cross_attn(self.norm3(x), image_kv)
        if self.action_model is not None and context.action_rotation is not None:
            actions = (context.keyboard, context.mouse)
            x = self.action_model(x, *actions, context.action_rotation, past, context.update_cache)
        return add_gated(x, gate2, self.ffn(modulate(x, shift2, scale2, self.eps)))


class Head(nn.Module):
    """Tokens to patches of velocity."""

    def __init__(self, config: ActionDiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        self.head = nn.Linear(config.dim, config.out_dim * config.patch_size[1] * config.patch_size[2])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(b l p) for tokens x (b l d) and the time embedding (b g d) float32."""
        shift, scale = (self.modulation.float()[:, None] + time[:, :, None]).to(x.dtype).unbind(dim=2)
        return self.head(modulate(x, shift, scale, self.eps))
