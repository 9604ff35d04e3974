"""What a stream remembers of its past: keys and values of the newest frames, in buffers whose shapes never change."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from model.attention import attend
from model.masks import BlockCausal, BlockCausalMask
from model.rope import rotate


class Window:
    """Keys and values of the frames that the next block will see at one place of the model: the sink, then the newest.

    The frames stand at the end of buffers (b f t a e), the newest last, so that a full window is read as it lies.
    """

    def __init__(self, rule: BlockCausal, shape: tuple[int, ...], like: Tensor) -> None:
        """`shape` is (b t a e): rows, tokens per frame, heads, channels; dtype and device are those of `like`."""
        assert rule.window is not None
        self.rule, self.frames, self.filled = rule, rule.window - rule.block, 0
        rows, *token = shape
        self.k, self.v = (torch.zeros(rows, self.frames, *token, dtype=like.dtype, device=like.device) for _ in "kv")

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (b m t a e) of the m frames that are there, as views."""
        return self.k[:, self.frames - self.filled :], self.v[:, self.frames - self.filled :]

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Takes in a block (b f t a e); the oldest frames after the sink leave when there is no room."""
        for buffer, known, new in zip((self.k, self.v), self.read(), (k, v), strict=True):
            both = torch.cat([known, new.to(buffer.dtype)], dim=1)
            if both.shape[1] > self.frames:
                kept = self.frames - self.rule.sink
                both = torch.cat([both[:, : self.rule.sink], both[:, both.shape[1] - kept :]], dim=1)
            buffer[:, self.frames - both.shape[1] :] = both
        self.filled = min(self.frames, self.filled + k.shape[1])


Past = BlockCausalMask | Window | None  # of a clip seen whole, of a stream, or no order in time at all


class LayerPast(NamedTuple):
    """The past at the three places of a block where tokens look along time."""

    video: Past = None
    mouse: Past = None
    keyboard: Past = None


NO_PAST = LayerPast()


class LayerWindows(NamedTuple):
    """One block's part of a cache; no windows where there is no action module."""

    video: Window
    mouse: Window | None
    keyboard: Window | None


@dataclass
class KVCache:
    """The state of one stream (or of a batch of them that advance together)."""

    layers: list[LayerWindows]
    context: list[tuple[Tensor, Tensor] | None]  # per block: keys and values (b m a e) of the image tokens
    grid: tuple[int, int, int]  # samples, rows and columns of patches that it is for
    start: int = 0  # latent frames taken in so far

    @property
    def filled(self) -> int:
        """Frames of the past that the next block sees."""
        return self.layers[0].video.filled

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers of keys and values."""
        windows = [window for layer in self.layers for window in layer if window is not None]
        return sum(buffer.nbytes for window in windows for buffer in (window.k, window.v))


def attend_along_time(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, past: Past, keep: bool = False, backend: str = "sdpa"
) -> Tensor:
    """Attention (b f t a e) of queries (b f t a e) to keys and values (b f u a e) of their frames and of the past.

    `rotation` (g t 1 e'), or (g 1 1 e') for all tokens of a frame alike, places the newest g frames in time; g is f,
    or with positions relative to a window as many as the window shows. `keep` appends the frames to a `Window`.
    """
    if isinstance(past, Window):
        return _attend_to_window(q, k, v, rotation, past, keep, backend)
    if past is not None and past.rule.relative and past.rule.sink:
        return _attend_relatively(q, k, v, rotation, past, backend)
    return _attend_tokens(rotate(q, rotation), rotate(k, rotation), v, past, backend)


def _attend_tokens(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None, backend: str) -> Tensor:
    frames = q.shape[1]
    q, k, v = (rearrange(x, "b f t a e -> b (f t) a e") for x in (q, k, v))
    return rearrange(attend(q, k, v, mask, backend), "b (f t) a e -> b f t a e", f=frames)


def _attend_to_window(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, window: Window, keep: bool, backend: str
) -> Tensor:
    relative, own = window.rule.relative, rotation[len(rotation) - q.shape[1] :]
    fresh = k if relative else rotate(k, own)  # a position that is counted inside the window changes as it moves
    known_k, known_v = window.read()
    keys, values = torch.cat([known_k, fresh], dim=1), torch.cat([known_v, v], dim=1)
    attended = _attend_tokens(rotate(q, own), rotate(keys, rotation) if relative else keys, values, None, backend)
    if keep:
        window.append(fresh, v)
    return attended


def _attend_relatively(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, mask: BlockCausalMask, backend: str
) -> Tensor:
    """Block after block as a stream would: with a sink, the distance to it depends on the block that looks."""
    attended = []
    for own, ranges in mask.blocks():
        keys, values = (torch.cat([x[:, one] for one in ranges], dim=1) for x in (k, v))
        shown, length = keys.shape[1], own.stop - own.start
        queries = rotate(q[:, own], rotation[shown - length : shown])
        attended.append(_attend_tokens(queries, rotate(keys, rotation[:shown]), values, None, backend))
    return torch.cat(attended, dim=1)
