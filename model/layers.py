"""The transformer's small parts, which know nothing of time or actions."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width, in fp32; the scale is applied after casting back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        return rms_normalize(x, self.eps) * self.weight


class PatchEmbedding(nn.Conv3d):
    """The official convolution with kernel = stride, as the linear map over patches that it is."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tokens (b f*h*w d) of latents (b c f h*p w*q), in the dtype of the parameters."""
        _, p, q = self.kernel_size
        patches = rearrange(x.to(self.weight.dtype), "b c f (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class FP32Linear(nn.Linear):
    """A linear layer in fp32 whatever the parameters' dtype: bf16 cannot tell neighbouring timesteps apart."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(... d) -> (... d') float32."""
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class ImageEmbedding(nn.Module):
    """Image tokens to the model's width."""

    def __init__(self, img_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(  # eps 1e-5 and the exact GELU, unlike the blocks
            nn.LayerNorm(img_dim), nn.Linear(img_dim, img_dim), nn.GELU(), nn.Linear(img_dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, visual: Tensor) -> Tensor:
        """(b m img_dim) -> (b m d)."""
        return self.proj(visual)


def time_sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoids (... channels) float32, cosines first, of timesteps (...); angles in float64."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift for tokens x (b l d), shift and scale (b g d) shared by l / g tokens each.

    The norm's statistics are fp32 in every dtype: torch computes them so.
    """
    y = rearrange(F.layer_norm(x, x.shape[-1:], eps=eps), "b (g s) d -> b g s d", g=scale.shape[1])
    return rearrange(torch.addcmul(shift[:, :, None], y, 1 + scale[:, :, None]), "b g s d -> b (g s) d")


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y for tokens x, y (b l d) and gates (b g d) shared by l / g tokens each."""
    gated = gate[:, :, None] * rearrange(y, "b (g s) d -> b g s d", g=gate.shape[1])
    return x + rearrange(gated, "b g s d -> b (g s) d")


def rms_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x (... e) divided by its root mean square over e, computed in fp32."""
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
