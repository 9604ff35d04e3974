"""ActionDiT: the video diffusion transformer of Matrix-Game 2.0 (a Wan 2.1 DiT with keyboard and mouse modules).

Parameter names and shapes are those of the official checkpoints, so files need no conversion.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.actions import ActionConfig, ActionModule, action_rotation, unit_rms
from model.attention import attend
from model.rope import rotate, video_rotation


@dataclass(frozen=True)
class ActionDiTConfig:
    """Every size of the model; names as in the official config.json where it has them."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    action: ActionConfig | None = None
    in_dim: int = 36  # noisy latents ++ 4 mask channels ++ conditioning latents
    out_dim: int = 16  # latent channels
    freq_dim: int = 256  # of the time sinusoid
    patch_size: tuple[int, int, int] = (1, 2, 2)  # latent frames, rows, columns
    eps: float = 1e-6
    vision: Literal["tokens", "pooled", "none"] = (
        "tokens"  # CLIP tokens (b 257 c), one pooled (b 1 c), or no such input
    )
    img_dim: int = 1280  # channels of the CLIP tokens
    attention: str = "sdpa"  # backend of the video's self- and cross-attention; `dense` suits bf16 on a CPU
    checkpoint_every: int = 0  # activation checkpointing: 0 off, 1 every block, n every n-th

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.dim // self.num_heads < 6:
            raise ValueError(f"dim {self.dim} must be num_heads {self.num_heads} x an even number of at least 6")
        if self.patch_size[0] != 1:
            raise ValueError(
                f"patch_size {self.patch_size}: one latent frame per patch; every frame has its own actions"
            )
        if self.checkpoint_every < 0 or self.freq_dim % 2:
            raise ValueError(f"checkpoint_every {self.checkpoint_every} must be >= 0 and freq_dim {self.freq_dim} even")
        outside = [i for i in self.action.blocks if not 0 <= i < self.num_layers] if self.action else []
        if outside:
            raise ValueError(f"action.blocks names {outside}, but the blocks are 0 to {self.num_layers - 1}")


class Inputs(NamedTuple):
    """What every block is given besides the tokens."""

    modulation: Tensor  # (b g 6 d) float32, g = 1, or one per latent frame
    rotation: Tensor  # (l 1 e) complex64, of the video tokens
    context: Tensor | None  # (b m d) image tokens
    keyboard: Tensor | None  # (b f window k)
    mouse: Tensor | None  # (b f window 2)
    action_rotation: Tensor | None  # (f 1 e) complex64


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width, in fp32; the scale is applied after casting back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        return unit_rms(x, self.eps) * self.weight


class Attention(nn.Module):
    """Self-attention over the video tokens (with `rotation`) or cross-attention to a context (without)."""

    def __init__(self, config: ActionDiTConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.num_heads, config.attention
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, context: Tensor, rotation: Tensor | None = None) -> Tensor:
        """(b l d) for queries from x (b l d), keys and values from context (b m d)."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (rearrange(y, "b l (a e) -> b l a e", a=self.heads) for y in (q, k, v))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.o(rearrange(attend(q, k, v, backend=self.backend), "b l a e -> b l (a e)"))


class Block(nn.Module):
    """Self-attention, cross-attention to the image, actions, feed-forward."""

    def __init__(self, config: ActionDiTConfig, index: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))
        self.self_attn = Attention(config)
        self.norm3 = self.cross_attn = None
        if config.vision != "none":
            self.norm3 = nn.LayerNorm(config.dim, config.eps)
            self.cross_attn = Attention(config)
        has_actions = config.action is not None and index in config.action.blocks
        self.action_model = ActionModule(config.action, config.dim) if config.action and has_actions else None
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Tokens (b l d) -> (b l d)."""
        modulation = (self.modulation.float()[:, None] + inputs.modulation).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(dim=2)
        y = modulate(x, shift1, scale1, self.eps)
        x = add_gated(x, gate1, self.self_attn(y, y, inputs.rotation))
        if self.cross_attn is not None and self.norm3 is not None and inputs.context is not None:
            x = x + self.cross_attn(self.norm3(x), inputs.context)
        if self.action_model is not None and inputs.action_rotation is not None:
            x = self.action_model(x, inputs.keyboard, inputs.mouse, inputs.action_rotation)
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


class PatchEmbedding(nn.Conv3d):
    """The official convolution with kernel = stride, as the linear map over patches that it is."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tokens (b f*h*w d) of latents (b c f h*p w*q), in the dtype of the parameters."""
        _, p, q = self.kernel_size
        patches = rearrange(x.to(self.weight.dtype), "b c f (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ExactLinear(nn.Linear):
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


class ActionDiT(nn.Module):
    """Velocity of noisy latents, given time, known latents, actions and the first image. Built initialised."""

    def __init__(self, config: ActionDiTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(
            config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.time_embedding = nn.Sequential(ExactLinear(config.freq_dim, dim), nn.SiLU(), ExactLinear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), ExactLinear(dim, 6 * dim))
        self.img_emb = ImageEmbedding(config.img_dim, dim) if config.vision != "none" else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head = Head(config)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Upstream's start: Xavier, N(0, 0.02) in the time embedding, zeros where an output is added or leaves."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Block | Head):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5, generator=generator)
        for module in self.modules():
            if isinstance(module, ActionModule):
                module.scale_inputs()
        for name, parameter in self.named_parameters():
            if name in ("time_embedding.0.weight", "time_embedding.2.weight"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            if name.endswith(("head.head.weight", "proj_mouse.weight", "proj_keyboard.weight")):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Tensor,
        keyboard: Tensor | None = None,
        mouse: Tensor | None = None,
        visual: Tensor | None = None,
    ) -> Tensor:
        """Velocity (b c f h w) float32 of noisy latents x (b c f h w).

        `timestep` = 1000 sigma, a float, (b) or (b f); `cond` (b 4+c f h w) from `conditioning.condition`; `keyboard`
        (b f window k) and `mouse` (b f window 2) from `action_windows`, None for no such input; `visual` (b m img_dim).
        """
        self._check(x, cond, visual)
        self._check_actions(keyboard, mouse, x.shape[2])
        p, q = self.config.patch_size[1:]
        f, h, w = x.shape[2], x.shape[3] // p, x.shape[4] // q
        tokens = self.patch_embedding(torch.cat([x, cond.to(x.dtype)], dim=1))
        time = timestep if timestep.ndim == 2 else timestep[:, None]
        time = self.time_embedding(time_sinusoid(time, self.config.freq_dim))
        inputs = Inputs(
            modulation=rearrange(self.time_projection(time), "b g (six d) -> b g six d", six=6),
            rotation=video_rotation(f, h, w, self.config.dim // self.config.num_heads, device=x.device),
            context=self.img_emb(visual.to(tokens.dtype)) if self.img_emb is not None and visual is not None else None,
            keyboard=None if keyboard is None else keyboard.to(tokens.dtype),
            mouse=None if mouse is None else mouse.to(tokens.dtype),
            action_rotation=action_rotation(self.config.action, f, device=x.device) if self.config.action else None,
        )
        for i, block in enumerate(self.blocks):
            every = self.config.checkpoint_every
            if every and i % every == 0 and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, inputs, use_reentrant=False)
            else:
                tokens = block(tokens, inputs)
        patches = self.head(tokens, time).float()
        return rearrange(patches, "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h, w=w, p=p, q=q)

    def _check(self, x: Tensor, cond: Tensor, visual: Tensor | None) -> None:
        config = self.config
        if x.shape[1] != config.out_dim or x.shape[1] + cond.shape[1] != config.in_dim:
            raise ValueError(
                f"{x.shape[1]} latent and {cond.shape[1]} conditioning channels for a model of {config.out_dim} and "
                f"{config.in_dim - config.out_dim}"
            )
        if x.shape[3] % config.patch_size[1] or x.shape[4] % config.patch_size[2]:
            raise ValueError(f"latents of {x.shape[3]}x{x.shape[4]} do not divide into patches of {config.patch_size}")
        if (visual is None) != (config.vision == "none"):
            raise ValueError(
                f"vision {config.vision!r}: image tokens must {'not ' if visual is not None else ''}be given"
            )
        if visual is not None and config.vision == "pooled" and visual.shape[1] != 1:
            raise ValueError(f"vision 'pooled' takes one image token, not {visual.shape[1]}; use vision=tokens")

    def _check_actions(self, keyboard: Tensor | None, mouse: Tensor | None, f: int) -> None:
        action = self.config.action
        keys = action.keyboard_dim_in if action and action.enable_keyboard else 0
        axes = action.mouse_dim_in if action and action.enable_mouse else 0
        for name, windows, channels in (("keyboard", keyboard, keys), ("mouse", mouse, axes)):
            if windows is None:
                continue
            expected = (f, action.window, channels) if action and channels else None
            if expected != tuple(windows.shape[1:]):
                raise ValueError(f"{name} windows {tuple(windows.shape[1:])} for a model that takes {expected}")


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
