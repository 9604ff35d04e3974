"""ActionDiT: the video diffusion transformer of Matrix-Game 2.0 (a Wan 2.1 DiT with keyboard and mouse modules).

Parameter names and shapes are those of the official checkpoints, so files need no conversion.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import UserError
from model.actions import ActionModule, UnusedRMSNormScale
from model.block import Block, BlockContext, Head
from model.config import ActionDiTConfig
from model.kv_cache import KVCache, LayerKVCache, LayerPast
from model.layers import FP32Linear, ImageEmbedding, PatchEmbedding, RMSNorm, time_sinusoid
from model.masks import BlockCausalMask, CausalConfig
from model.rope import video_rotation
from model.side_paths import ActionPlaceMap, ActionTimeEmbedding, PatchBorders, action_rows

# Surrounds the initialisation of a submodule, given with its name: there it may have memory that it otherwise has not.
Materialize = Callable[[tuple[str, nn.Module]], AbstractContextManager[object]]
# Weights of outputs that are added to something, or leave.
ZERO_AT_FIRST = (
    "head.head.weight", "proj_mouse.weight", "proj_keyboard.weight",
    "action_time.3.weight", "action_place.actions.weight", "action_place.place.weight", "borders.correct.weight",
)  # fmt: skip
CompileMode = Literal["no", "default", "reduce-overhead", "max-autotune"]  # torch.compile's modes


class ActionDiT(nn.Module):
    """Velocity of noisy latents, given time, known latents, actions and the first image. Built initialised."""

    def __init__(self, config: ActionDiTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(
            config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.time_embedding = nn.Sequential(FP32Linear(config.freq_dim, dim), nn.SiLU(), FP32Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), FP32Linear(dim, 6 * dim))
        self.img_emb = ImageEmbedding(config.img_dim, dim) if config.vision != "none" else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head = Head(config)
        action, patch = config.action, config.patch_size[1]
        self.action_time = ActionTimeEmbedding(action, dim) if action and action.time_path else None
        self.action_place = ActionPlaceMap(action, dim) if action and action.place_path else None
        known = config.in_dim + config.out_dim
        self.borders = PatchBorders(dim, config.borders, known, config.out_dim, patch) if config.borders else None
        self.init_weights(generator)

    def submodules(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers with their names, block by block."""
        for name, child in self.named_children():
            if child is self.blocks:
                yield from ((f"{name}.{i}", block) for i, block in enumerate(self.blocks))
            else:
                yield name, child

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, materialize: Materialize = nullcontext) -> None:
        """Upstream's start: Xavier, N(0, 0.02) in the time embedding, zeros where an output is added or leaves.

        One submodule after the other, each inside `materialize((name, module))`. The time embedding comes a second
        time, in which all of it is set: its numbers are drawn last.
        """
        for name, module in self.submodules():
            with materialize((name, module)):
                init_submodule(name, module, generator)
        with materialize(("time_embedding", self.time_embedding)):
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
        update_cache: bool = False,
        doubled: bool = False,
    ) -> Tensor:
        """Velocity (b c f h w) float32 of noisy latents x (b c f h w).

        `timestep` = 1000 sigma, a float, (b) or (b f); `cond` (b 4+c f h w), `keyboard` (b f window k), `mouse`
        (b f window 2) and `visual` (b m img_dim) from `inputs.model_inputs`.

        A causal model takes a clip from its first frame on, whose frames see what the mask lets them; or, with a
        `cache` of `make_cache`, the one block that follows what the cache holds, and `visual` stays with the cache.
        The pass changes the cache only with `update_cache`: then the block is appended. With `doubled` all inputs hold
        the clip twice, first as a past and then as what follows from it (masks.BlockCausalMask).
        """
        self._check(x, cond, keyboard, mouse, visual, cache)
        p, q = self.config.patch_size[1:]
        f, h, w = x.shape[2], x.shape[3] // p, x.shape[4] // q
        given = torch.cat([x, cond.to(x.dtype)], dim=1)
        tokens = self.patch_embedding(given)
        times = timestep if timestep.ndim == 2 else timestep[:, None]
        time = self.time_embedding(time_sinusoid(times, self.config.freq_dim))
        time, tokens = self._add_actions(time, tokens, keyboard, mouse, (f, h, w))
        rotation, action_rotation = self._rotations(f, h, w, cache, doubled, x.device)
        context = BlockContext(
            modulation=rearrange(self.time_projection(time), "b g (six d) -> b g six d", six=6),
            rotation=rotation,
            keyboard=None if keyboard is None else keyboard.to(tokens.dtype),
            mouse=None if mouse is None else mouse.to(tokens.dtype),
            action_rotation=action_rotation,
            update_cache=update_cache,
        )
        if cache is None:
            tokens = self._see_clip(tokens, context, visual, self._masks(f, h * w, doubled))
        else:
            for block, image_kv, past in zip(self.blocks, cache.image_kv, cache.layers, strict=True):
                tokens = block(tokens, context, image_kv, past)
            cache.position += f if update_cache else 0
        patches = self.head(tokens, time).float()
        velocity = rearrange(patches, "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h, w=w, p=p, q=q)
        if self.borders is not None:
            velocity = velocity + self.borders(tokens, torch.cat([given, velocity.to(given.dtype)], dim=1))
        return velocity

    def _add_actions(
        self, time: Tensor, tokens: Tensor, keyboard: Tensor | None, mouse: Tensor | None, grid: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """The time embedding (b g d) and the tokens (b l d) with what the side paths add for the actions."""
        action, (f, h, w) = self.config.action, grid
        if action is None or (self.action_time is None and self.action_place is None):
            return time, tokens
        rows = action_rows(action, f, keyboard, mouse, tokens)
        if self.action_time is not None:
            time = time + self.action_time(rows).float()
        if self.action_place is not None:
            tokens = tokens + self.action_place(rows, h, w)
        return time, tokens

    def _see_clip(self, tokens: Tensor, context: BlockContext, visual: Tensor | None, masks: LayerPast) -> Tensor:
        """Tokens (b l d) of a whole clip after all blocks, every n-th of them checkpointed in training."""
        image = self._image(visual, tokens.dtype)
        every = self.config.checkpoint_every
        for i, block in enumerate(self.blocks):
            if every and i % every == 0 and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, context, image, masks, use_reentrant=False)
            else:
                tokens = block(tokens, context, image, masks)
        return tokens

    def _image(self, visual: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Image tokens at the model's width (b m d)."""
        return self.img_emb(visual.to(dtype)) if self.img_emb is not None and visual is not None else None

    def compile_blocks(self, mode: CompileMode) -> None:
        """torch.compile, block by block and in place: names of weights stay, and equal blocks compile once."""
        if mode != "no":
            for block in self.blocks:
                block.compile(mode=mode)

    @torch.no_grad()
    def make_cache(self, b: int, height: int, width: int, visual: Tensor | None = None) -> KVCache:
        """An empty cache for streams of `b` samples of latents of `height` x `width`, with their image tokens."""
        causal, like = self.config.causal, self.patch_embedding.weight
        if causal is None or causal.window is None:
            why = "was not trained causally (no `causal` section)" if causal is None else "has causal.window=null"
            raise UserError(f"this model cannot stream: it {why}; train it with diffusion_forcing and a window")
        assert (visual is None) == (self.config.vision == "none")
        rows, columns = height // self.config.patch_size[1], width // self.config.patch_size[2]
        image = self._image(visual, like.dtype)
        crosses = [getattr(block, "cross_attn", None) for block in self.blocks]
        image_kv = [cross.keys_and_values(image) if cross is not None else None for cross in crosses]
        layers = [self._layer_cache(causal, i, b, rows * columns) for i in range(len(self.blocks))]
        return KVCache(layers, image_kv, (b, rows, columns))

    def _layer_cache(self, causal: CausalConfig, index: int, b: int, s: int) -> LayerPast:
        """Empty caches of one block for `b` samples of `s` tokens per frame."""
        action, heads, like = self.config.action, self.config.num_heads, self.patch_embedding.weight
        video = LayerKVCache(causal.video_rule(), (b, s, heads, self.config.dim // heads), like)
        mouse = keyboard = None
        if action is not None and index in action.blocks:
            a, rule = action.heads_num, causal.action_rule()
            if action.enable_mouse:
                mouse = LayerKVCache(rule, (b * s, 1, a, action.mouse_hidden_dim // a), like)
            if action.enable_keyboard:
                keyboard = LayerKVCache(rule, (b, 1, a, action.keyboard_hidden_dim // a), like)
        return LayerPast(video, mouse, keyboard)

    def _rotations(
        self, f: int, h: int, w: int, cache: KVCache | None, doubled: bool, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Positions of the video tokens (g h*w 1 e) and of the frames in the action modules (g 1 e)."""
        causal, start = self.config.causal, 0
        if cache is not None and causal is not None:
            if causal.positions == "relative":
                f += cache.length
            else:
                start = cache.position
        halves, head_dim = 1 + doubled, self.config.dim // self.config.num_heads
        rotation = video_rotation((f // halves, h, w), head_dim, self.config.rope_theta, start, device)
        rotation = repeat(rotation, "(f s) one e -> (halves f) s one e", s=h * w, halves=halves)
        action = self.config.action
        placed = action.rotation(f // halves, start, device).repeat(halves, 1, 1) if action else None
        return rotation, placed

    def _masks(self, f: int, s: int, doubled: bool) -> LayerPast:
        """What a clip of f frames of s tokens may see; all of it within one block."""
        causal = self.config.causal
        if causal is None or (f <= causal.block and not doubled):
            return LayerPast()
        f, video, action = f // (1 + doubled), causal.video_rule(), causal.action_rule()
        return LayerPast(
            BlockCausalMask(video, f, s, s, doubled),
            BlockCausalMask(action, f, 1, 1, doubled),
            BlockCausalMask(action, f, s, 1, doubled),
        )

    def _check(
        self,
        x: Tensor,
        cond: Tensor,
        keyboard: Tensor | None,
        mouse: Tensor | None,
        visual: Tensor | None,
        cache: KVCache | None,
    ) -> None:
        """Raises UserError for inputs of a model of other sizes, or not of the one block that a cache takes."""
        config, action, (_, p, q) = self.config, self.config.action, self.config.patch_size
        b, _, f, h, w = x.shape
        conditioning = config.in_dim - config.out_dim
        window, keys, axes = (action.window, action.keys, action.mouse_dim_in) if action else (0, 0, 0)
        compared = [
            ("channels of latents and cond", (x.shape[1], cond.shape[1]), (config.out_dim, conditioning)),
            (f"what {h}x{w} leave after patches of {p}x{q}", (h % p, w % q), (0, 0)),
            ("image tokens given", visual is not None, config.vision != "none" and cache is None),
        ]
        compared += [("keyboard windows", keyboard.shape[1:], (f, window, keys))] if keyboard is not None else []
        compared += [("mouse windows", mouse.shape[1:], (f, window, axes))] if mouse is not None else []
        if cache is not None and config.causal is not None:
            block = (*cache.grid, config.causal.block)
            compared += [("samples, rows, columns of patches and latents", (b, h // p, w // q, f), block)]
        for what, actual, expected in compared:
            if actual != expected:
                raise UserError(f"{what}: {actual} for a model that takes {expected}")


def init_submodule(name: str, submodule: nn.Module, generator: torch.Generator | None) -> None:
    """The start of the submodule `name` of an ActionDiT; everything in it is set."""
    for module in submodule.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Block | Head):
            nn.init.normal_(module.modulation, std=module.modulation.shape[-1] ** -0.5, generator=generator)
        if isinstance(module, RMSNorm | UnusedRMSNormScale):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for module in submodule.modules():
        if isinstance(module, ActionModule):
            module.scale_inputs()
    for key, parameter in submodule.named_parameters():
        if f"{name}.{key}".endswith(ZERO_AT_FIRST):
            nn.init.zeros_(parameter)
