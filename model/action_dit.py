"""ActionDiT: the video diffusion transformer of Matrix-Game 2.0 (a Wan 2.1 DiT with keyboard and mouse modules).

Parameter names and shapes are those of the official checkpoints, so files need no conversion.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import UserError
from model.actions import ActionConfig, ActionModule, StoredScale, action_rotation
from model.attention import attend
from model.kv_cache import NO_PAST, KVCache, LayerPast, LayerWindows, Past, Window, attend_along_time
from model.layers import ExactLinear, ImageEmbedding, PatchEmbedding, RMSNorm, add_gated, modulate, time_sinusoid
from model.limits import MANY, WIDE, require_between
from model.masks import BlockCausalMask, CausalConfig
from model.rope import video_rotation

# What surrounds the turn of a part, given with its name, of a model that is initialised.
Present = Callable[[tuple[str, nn.Module]], AbstractContextManager[object]]
CompileMode = Literal["no", "default", "reduce-overhead", "max-autotune"]  # torch.compile's modes


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
    causal: CausalConfig | None = None  # a model that sees the past alone and can stream; None: all frames at once
    attention: str = "sdpa"  # backend of the video's self- and cross-attention; `dense` suits bf16 on a CPU
    checkpoint_every: int = 0  # activation checkpointing: 0 off, 1 every block, n every n-th

    def __post_init__(self) -> None:
        require_between("model.", 1, WIDE, dim=self.dim, ffn_dim=self.ffn_dim, freq_dim=self.freq_dim)
        require_between("model.", 1, WIDE, in_dim=self.in_dim, out_dim=self.out_dim, img_dim=self.img_dim)
        require_between("model.", 1, MANY, num_heads=self.num_heads, num_layers=self.num_layers)
        require_between("model.patch_size: ", 1, 64, latents=self.patch_size[0], rows=self.patch_size[1])
        require_between("model.patch_size: ", 1, 64, columns=self.patch_size[2])
        require_between("model.", 0, 1, eps=self.eps)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.dim // self.num_heads < 6:
            raise UserError(f"dim {self.dim} must be num_heads {self.num_heads} x an even number of at least 6")
        if self.patch_size[0] != 1:
            raise UserError(
                f"patch_size {self.patch_size}: one latent frame per patch; every frame has its own actions"
            )
        if self.checkpoint_every < 0 or self.freq_dim % 2:
            raise UserError(f"checkpoint_every {self.checkpoint_every} must be >= 0 and freq_dim {self.freq_dim} even")
        outside = [i for i in self.action.blocks if not 0 <= i < self.num_layers] if self.action else []
        if outside:
            raise UserError(f"action.blocks names {outside}, but the blocks are 0 to {self.num_layers - 1}")


class Inputs(NamedTuple):
    """What every block is given besides the tokens and its past."""

    modulation: Tensor  # (b g 6 d) float32, g = 1, or one per latent frame
    rotation: Tensor  # (f s 1 e) complex64, of the video tokens; f as in `attend_along_time`
    keyboard: Tensor | None  # (b f window k)
    mouse: Tensor | None  # (b f window 2)
    action_rotation: Tensor | None  # (f 1 e) complex64
    keep: bool  # the frames are appended to the windows of the past


class Attention(nn.Module):
    """The projections of an attention over the whole width."""

    def __init__(self, config: ActionDiTConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.num_heads, config.attention
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

    def forward(self, x: Tensor, rotation: Tensor, past: Past, keep: bool) -> Tensor:
        """(b l d) for tokens x (b l d), placed and with a past as in `attend_along_time`."""
        parts = (self.queries(x), *self.keys_and_values(x))
        q, k, v = (rearrange(y, "b (f s) a e -> b f s a e", s=rotation.shape[1]) for y in parts)
        attended = attend_along_time(q, k, v, rotation, past, keep, self.backend)
        return self.o(rearrange(attended, "b f s a e -> b (f s) (a e)"))


class CrossAttention(Attention):
    """Attention of the video tokens to the image tokens."""

    def forward(self, x: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """(b l d) for queries from x (b l d) to `context`, keys and values (b m a e)."""
        return self.o(rearrange(attend(self.queries(x), *context, backend=self.backend), "b l a e -> b l (a e)"))


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
        has_actions = config.action is not None and index in config.action.blocks
        self.action_model = ActionModule(config.action, config.dim) if config.action and has_actions else None
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x: Tensor,
        inputs: Inputs,
        context: Tensor | tuple[Tensor, Tensor] | None,
        past: LayerPast | LayerWindows,
    ) -> Tensor:
        """Tokens (b l d) -> (b l d). `context` are the image tokens (b m d), or their keys and values (b m a e)."""
        modulation = (self.modulation.float()[:, None] + inputs.modulation).to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(dim=2)
        y = modulate(x, shift1, scale1, self.eps)
        x = add_gated(x, gate1, self.self_attn(y, inputs.rotation, past.video, inputs.keep))
        if self.cross_attn is not None and self.norm3 is not None and context is not None:
            keys = self.cross_attn.keys_and_values(context) if isinstance(context, Tensor) else context
            x = x + self.cross_attn(self.norm3(x), keys)
        if self.action_model is not None and inputs.action_rotation is not None:
            actions = (inputs.keyboard, inputs.mouse)
            x = self.action_model(x, *actions, inputs.action_rotation, past, inputs.keep)
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

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers with their names, block by block."""
        for name, child in self.named_children():
            if child is self.blocks:
                yield from ((f"{name}.{i}", block) for i, block in enumerate(self.blocks))
            else:
                yield name, child

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None, present: Present = nullcontext) -> None:
        """Upstream's start: Xavier, N(0, 0.02) in the time embedding, zeros where an output is added or leaves.

        Part after part, each within `present((name, part))`: there it may have memory that it has not before and
        after. The time embedding has a second turn, in which all of it is set: its numbers are drawn last.
        """
        for name, part in self.parts():
            with present((name, part)):
                initialise_part(name, part, generator)
        with present(("time_embedding", self.time_embedding)):
            for layer in self.time_embedding:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02, generator=generator)
                    nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Tensor,
        keyboard: Tensor | None = None,
        mouse: Tensor | None = None,
        visual: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        keep: bool = False,
    ) -> Tensor:
        """Velocity (b c f h w) float32 of noisy latents x (b c f h w).

        `timestep` = 1000 sigma, a float, (b) or (b f); `cond` (b 4+c f h w) from `inputs.condition`; `keyboard`
        (b f window k) and `mouse` (b f window 2) from `action_windows`, None for no such input; `visual` (b m img_dim).

        A causal model takes a clip from its first frame on, whose frames see what the mask lets them; or, with a
        `cache` of `make_cache`, the one block that follows what the cache holds, and `visual` stays with the cache.
        The pass changes the cache only with `keep`: then the block is appended.
        """
        self._check(x, cond, visual, cache)
        self._check_actions(keyboard, mouse, x.shape[2])
        p, q = self.config.patch_size[1:]
        f, h, w = x.shape[2], x.shape[3] // p, x.shape[4] // q
        tokens = self.patch_embedding(torch.cat([x, cond.to(x.dtype)], dim=1))
        time = timestep if timestep.ndim == 2 else timestep[:, None]
        time = self.time_embedding(time_sinusoid(time, self.config.freq_dim))
        rotation, actions_at = self._rotations(f, h, w, cache, x.device)
        inputs = Inputs(
            modulation=rearrange(self.time_projection(time), "b g (six d) -> b g six d", six=6),
            rotation=rotation,
            keyboard=None if keyboard is None else keyboard.to(tokens.dtype),
            mouse=None if mouse is None else mouse.to(tokens.dtype),
            action_rotation=actions_at,
            keep=keep,
        )
        context = self.img_emb(visual.to(tokens.dtype)) if self.img_emb is not None and visual is not None else None
        masks = self._masks(f, h * w)
        for i, block in enumerate(self.blocks):
            every = self.config.checkpoint_every
            if cache is not None:
                tokens = block(tokens, inputs, cache.context[i], cache.layers[i])
            elif every and i % every == 0 and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, inputs, context, masks, use_reentrant=False)
            else:
                tokens = block(tokens, inputs, context, masks)
        if cache is not None and keep:
            cache.start += f
        patches = self.head(tokens, time).float()
        return rearrange(patches, "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h, w=w, p=p, q=q)

    def compile_blocks(self, mode: CompileMode) -> None:
        """torch.compile, block by block and in place: names of weights stay, and equal blocks compile once."""
        if mode != "no":
            for block in self.blocks:
                block.compile(mode=mode)

    @torch.no_grad()
    def make_cache(self, b: int, height: int, width: int, visual: Tensor | None = None) -> KVCache:
        """An empty cache for streams of `b` samples of latents of `height` x `width`, with their image tokens.

        Raises ValueError for a model that is not causal, or whose window has no end.
        """
        causal, action = self.config.causal, self.config.action
        if causal is None or causal.window is None:
            raise UserError(
                "this model cannot stream: it "
                + ("was not trained causally (no `causal` section)" if causal is None else "has causal.window=null")
                + "; train one with objective diffusion_forcing and give it a window"
            )
        self._check_sizes(height, width)
        self._check_visual(visual)
        rows, columns = height // self.config.patch_size[1], width // self.config.patch_size[2]
        like, s, heads = self.patch_embedding.weight, rows * columns, self.config.num_heads
        tokens = None if self.img_emb is None or visual is None else self.img_emb(visual.to(like.dtype))

        def windows(block: Block) -> LayerWindows:
            video = Window(causal.video_rule(), (b, s, heads, self.config.dim // heads), like)
            mouse = keyboard = None
            if block.action_model is not None and action is not None:
                rule, a = causal.action_rule(), action.heads_num
                if action.enable_mouse:
                    mouse = Window(rule, (b * s, 1, a, action.mouse_hidden_dim // a), like)
                if action.enable_keyboard:
                    keyboard = Window(rule, (b, 1, a, action.keyboard_hidden_dim // a), like)
            return LayerWindows(video, mouse, keyboard)

        blocks = [block for block in self.blocks if isinstance(block, Block)]
        context = [
            block.cross_attn.keys_and_values(tokens) if block.cross_attn is not None and tokens is not None else None
            for block in blocks
        ]
        return KVCache([windows(block) for block in blocks], context, (b, rows, columns))

    def _rotations(
        self, f: int, h: int, w: int, cache: KVCache | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Places of the video tokens (g h*w 1 e) and of the frames in the action modules (g 1 e)."""
        causal, start = self.config.causal, 0
        if cache is not None and causal is not None:
            relative = causal.positions == "relative"
            start, f = (0, cache.filled + f) if relative else (cache.start, f)
        rotation = video_rotation(f, h, w, self.config.dim // self.config.num_heads, start, device=device)
        rotation = rearrange(rotation, "(f s) one e -> f s one e", f=f)
        action = self.config.action
        return rotation, action_rotation(action, f, start, device) if action else None

    def _masks(self, f: int, s: int) -> LayerPast:
        """What a clip of f frames of s tokens may see; all of it within one block."""
        causal = self.config.causal
        if causal is None or f <= causal.block:
            return NO_PAST
        video, action = causal.video_rule(), causal.action_rule()
        return LayerPast(
            BlockCausalMask(video, f, s, s), BlockCausalMask(action, f, 1, 1), BlockCausalMask(action, f, s, 1)
        )

    def _check(self, x: Tensor, cond: Tensor, visual: Tensor | None, cache: KVCache | None) -> None:
        config = self.config
        if x.shape[1] != config.out_dim or x.shape[1] + cond.shape[1] != config.in_dim:
            raise UserError(
                f"{x.shape[1]} latent and {cond.shape[1]} conditioning channels for a model of {config.out_dim} and "
                f"{config.in_dim - config.out_dim}"
            )
        self._check_sizes(x.shape[3], x.shape[4])
        if cache is None:
            self._check_visual(visual)
            return
        if visual is not None:
            raise UserError("image tokens stay with the cache of a stream: give them to make_cache")
        grid = (len(x), x.shape[3] // config.patch_size[1], x.shape[4] // config.patch_size[2])
        if grid != cache.grid or config.causal is None or x.shape[2] != config.causal.block:
            raise UserError(
                f"a block of {x.shape[2]} latent frames of {grid} (samples, rows, columns of patches) for a cache of "
                f"{cache.grid} and a model with {config.causal}; give one block of the cache's size"
            )

    def _check_sizes(self, height: int, width: int) -> None:
        if height % self.config.patch_size[1] or width % self.config.patch_size[2]:
            raise UserError(f"latents of {height}x{width} do not divide into patches of {self.config.patch_size}")

    def _check_visual(self, visual: Tensor | None) -> None:
        vision = self.config.vision
        if (visual is None) != (vision == "none"):
            raise UserError(f"vision {vision!r}: image tokens must {'not ' if visual is not None else ''}be given")
        if visual is not None and vision == "pooled" and visual.shape[1] != 1:
            raise UserError(f"vision 'pooled' takes one image token, not {visual.shape[1]}; use vision=tokens")

    def _check_actions(self, keyboard: Tensor | None, mouse: Tensor | None, f: int) -> None:
        action = self.config.action
        keys = action.keys if action and action.enable_keyboard else 0
        axes = action.mouse_dim_in if action and action.enable_mouse else 0
        for name, windows, channels in (("keyboard", keyboard, keys), ("mouse", mouse, axes)):
            if windows is None:
                continue
            expected = (f, action.window, channels) if action and channels else None
            if expected != tuple(windows.shape[1:]):
                raise UserError(f"{name} windows {tuple(windows.shape[1:])} for a model that takes {expected}")


def initialise_part(name: str, part: nn.Module, generator: torch.Generator | None) -> None:
    """The start of the part `name` of an ActionDiT; everything in it is set."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Block | Head):
            nn.init.normal_(module.modulation, std=module.modulation.shape[-1] ** -0.5, generator=generator)
        if isinstance(module, RMSNorm | StoredScale):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for module in part.modules():
        if isinstance(module, ActionModule):
            module.scale_inputs()
    for key, parameter in part.named_parameters():
        if f"{name}.{key}".endswith(("head.head.weight", "proj_mouse.weight", "proj_keyboard.weight")):
            nn.init.zeros_(parameter)
