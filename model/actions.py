"""Keyboard and mouse: windows of actions per latent frame, and the module that lets tokens attend to them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from configs import within
from configs.errors import UserError
from configs.game import ActionSpace
from model.attention import FEW_KEYS
from model.kv_cache import LayerPast, attend_along_time
from model.layers import rms_normalize
from model.limits import MANY, WIDE
from model.rope import time_rotation


@dataclass(frozen=True)
class ActionConfig:
    """The action modules; names as in the official `action_config`."""

    blocks: tuple[int, ...]  # which DiT blocks own a module
    keyboard_dim_in: int | None = within(1, WIDE, None)  # keys; null: those of the game that the model is trained on
    mouse_dim_in: int = within(1, WIDE, 2)  # (pitch, yaw)
    enable_keyboard: bool = True
    enable_mouse: bool = True
    heads_num: int = within(1, MANY, 16)
    hidden_size: int = within(1, WIDE, 128)  # of the keyboard embedding
    keyboard_hidden_dim: int = within(1, WIDE, 1024)  # all heads together
    mouse_hidden_dim: int = within(1, WIDE, 1024)  # all heads together
    # Time, y, x; the grid is 1 x 1, so only the time part turns.
    rope_dim_list: tuple[int, ...] = within(0, WIDE, (8, 28, 28))
    rope_theta: float = within(1e-3, 1e9, 256.0)
    vae_time_compression_ratio: int = within(1, MANY, 4)  # pixel frames per latent frame
    windows_size: int = within(1, MANY, 3)  # latent frames whose actions a latent frame sees
    # Factor on the initial weights that read actions. What an action does to a picture is a product of the two, made
    # where a nonlinearity mixes token and window; in a narrow model 24 window inputs drown (docs/lab_notes.md).
    input_gain: float = 1.0
    # Ours (model/side_paths.py): the actions also in the time embedding, and in every token by a map of its place.
    time_path: bool = False
    place_path: bool = False

    def __post_init__(self) -> None:
        turned = self.rope_dim_list[0] if self.rope_dim_list else 1
        if turned % 2:
            raise UserError(f"model.action.rope_dim_list={list(self.rope_dim_list)} must begin with an even number")
        if not self.enable_keyboard and not self.enable_mouse:
            raise UserError("action module without keyboard and mouse; leave `action` out instead")
        enabled = {"keyboard_hidden_dim": self.enable_keyboard, "mouse_hidden_dim": self.enable_mouse}
        for name in (name for name in enabled if enabled[name]):
            width = getattr(self, name)
            if width % self.heads_num or width // self.heads_num < turned:
                raise UserError(f"model.action.{name}={width} must be heads_num {self.heads_num} x at least {turned}")

    @property
    def keys(self) -> int:
        """Keys that the model reads; 4 where no game is known, as for timing a shape."""
        return 4 if self.keyboard_dim_in is None else self.keyboard_dim_in

    def for_game(self, space: ActionSpace) -> "ActionConfig":
        """With the sizes of the game's action space. A UserError if keyboard_dim_in is another number."""
        if self.enable_keyboard and self.keyboard_dim_in not in (None, len(space.keys)):
            raise UserError(
                f"model.action.keyboard_dim_in={self.keyboard_dim_in}, but {space.name!r} has {len(space.keys)} keys "
                f"({', '.join(space.keys)}); leave it out, or give its own game"
            )
        keys = len(space.keys) if self.enable_keyboard else self.keys
        return replace(self, keyboard_dim_in=keys, enable_mouse=self.enable_mouse and space.mouse)

    @property
    def window(self) -> int:
        """Pixel frames whose actions a latent frame sees."""
        return self.vae_time_compression_ratio * self.windows_size

    def rotation(self, f: int, start: int = 0, device: torch.device | None = None) -> Tensor:
        """Rotations (f 1 e) that place `f` latent frames in time, the first at latent frame `start`."""
        return time_rotation(f, self.rope_dim_list[0], start, self.rope_theta, device)


class UnusedRMSNormScale(nn.Module):
    """An RMS scale that official files carry and upstream never applies: kept, so that files round-trip."""

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))


class WindowedLinear(nn.Linear):
    """A linear layer over [token, window of its frame]: the window is multiplied once per frame, not once per token."""

    def forward(self, x: Tensor, window: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(b f s d') for tokens x (b f s d) and windows (b f e), d + e = in_features."""
        d = x.shape[-1]
        per_frame = F.linear(window, self.weight[:, d:], self.bias)
        return F.linear(x, self.weight[:, :d]) + rearrange(per_frame, "b f d -> b f 1 d")


class ActionModule(nn.Module):
    """Adds to every token what the mouse did at its position and what the keys did in its frame."""

    def __init__(self, config: ActionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        if config.enable_keyboard:
            width, hidden = config.keyboard_hidden_dim, config.hidden_size
            head_dim = width // config.heads_num
            self.keyboard_embed = nn.Sequential(nn.Linear(config.keys, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            # The official name misleads: this makes the queries of the keyboard branch.
            self.mouse_attn_q = nn.Linear(dim, width, bias=False)
            self.keyboard_attn_kv = nn.Linear(config.window * hidden, 2 * width, bias=False)
            self.key_attn_q_norm = UnusedRMSNormScale(head_dim)
            self.key_attn_k_norm = UnusedRMSNormScale(head_dim)
            self.proj_keyboard = nn.Linear(width, dim, bias=False)
        if config.enable_mouse:
            width = config.mouse_hidden_dim
            head_dim = width // config.heads_num
            self.mouse_mlp = nn.Sequential(
                WindowedLinear(dim + config.window * config.mouse_dim_in, width),
                nn.GELU(approximate="tanh"),
                nn.Linear(width, width),
                nn.LayerNorm(width),  # eps 1e-5
            )
            self.t_qkv = nn.Linear(width, 3 * width, bias=False)
            self.img_attn_q_norm = UnusedRMSNormScale(head_dim)
            self.img_attn_k_norm = UnusedRMSNormScale(head_dim)
            self.proj_mouse = nn.Linear(width, dim, bias=False)

    @torch.no_grad()
    def scale_inputs(self) -> None:
        """Multiplies the weights that read actions by `input_gain`; part of the initialisation."""
        if self.config.enable_keyboard:
            self.get_parameter("keyboard_embed.0.weight").mul_(self.config.input_gain)
        if self.config.enable_mouse:
            window = self.config.window * self.config.mouse_dim_in
            self.get_parameter("mouse_mlp.0.weight")[:, -window:].mul_(self.config.input_gain)

    def forward(
        self,
        x: Tensor,
        keyboard: Tensor | None,
        mouse: Tensor | None,
        rotation: Tensor,
        past: LayerPast = LayerPast(),  # noqa: B008 - a tuple
        update_cache: bool = False,
    ) -> Tensor:
        """Tokens (b f*s d), with the residual, from tokens x (b f*s d) of the frames that `rotation` (f 1 e) places.

        `keyboard` (b f window k) and `mouse` (b f window 2) are windows of actions; a branch without them is skipped.
        `past` and `update_cache` as in `attend_along_time`.
        """
        rotation = rotation[:, None]
        if mouse is not None and self.config.enable_mouse:
            qkv = self._mouse_tokens(x, mouse)
            attended = attend_along_time(qkv, rotation, past.mouse, update_cache, FEW_KEYS)
            x = x + self.proj_mouse(rearrange(attended, "(b s) f 1 a e -> b (f s) (a e)", b=len(x)))
        if keyboard is not None and self.config.enable_keyboard:
            qkv = self._keyboard_tokens(x, keyboard)
            attended = attend_along_time(qkv, rotation, past.keyboard, update_cache, FEW_KEYS)
            x = x + self.proj_keyboard(rearrange(attended, "b f s a e -> b (f s) (a e)"))
        return x

    def _mouse_tokens(self, x: Tensor, mouse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values (b*s f 1 a e) for attention along time at every position by itself, over tokens that
        know their frame's mouse window."""
        mix, activate, project, normalise = self.mouse_mlp
        window = rearrange(mouse, "b f n k -> b f (n k)")
        hidden = mix(rearrange(x, "b (f s) d -> b f s d", f=mouse.shape[1]), window)
        qkv = self.t_qkv(normalise(project(activate(hidden))))
        q, k, v = rearrange(qkv, "b f s (qkv a e) -> qkv (b s) f 1 a e", qkv=3, a=self.config.heads_num)
        return rms_normalize(q), rms_normalize(k), v

    def _keyboard_tokens(self, x: Tensor, keyboard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b f s a e) of every token; keys and values (b f 1 a e), shared by all positions of a frame."""
        heads = self.config.heads_num
        embedded = rearrange(self.keyboard_embed(keyboard), "b f n d -> b f (n d)")
        k, v = rearrange(self.keyboard_attn_kv(embedded), "b f (kv a e) -> kv b f 1 a e", kv=2, a=heads)
        q = rearrange(self.mouse_attn_q(x), "b (f s) (a e) -> b f s a e", f=keyboard.shape[1], a=heads)
        return rms_normalize(q), rms_normalize(k), v
