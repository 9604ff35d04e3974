"""What a stream remembers: keys and values of the newest frames, in buffers whose shapes never change."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from model.attention import AttentionBackend, attend
from model.masks import BlockCausal, BlockCausalMask
from model.rope import rotate


class LayerKVCache:
    """Keys and values of the frames that the next block sees in one attention: the sink, then the newest.

    The frames stand at the end of buffers (b f t a e), the newest last, so that a full cache is read as it lies.
    """

    def __init__(self, rule: BlockCausal, shape: tuple[int, ...], like: Tensor) -> None:
        """`shape` is (b t a e): rows, tokens per frame, heads, channels; dtype and device are those of `like`."""
        assert rule.window is not None
        self.rule, self.capacity, self.length = rule, rule.window - rule.block, 0
        rows, *token = shape
        self.k, self.v = (like.new_zeros(rows, self.capacity, *token) for _ in "kv")

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (b m t a e) of the m frames that are there, as views."""
        return self.k[:, self.capacity - self.length :], self.v[:, self.capacity - self.length :]

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds a block (b f t a e); without room, the oldest frames after the sink are dropped."""
        for buffer, known, new in zip((self.k, self.v), self.read(), (k, v), strict=True):
            both = torch.cat([known, new.to(buffer.dtype)], dim=1)
            if both.shape[1] > self.capacity:
                newest = self.capacity - self.rule.sink
                both = torch.cat([both[:, : self.rule.sink], both[:, both.shape[1] - newest :]], dim=1)
            buffer[:, self.capacity - both.shape[1] :] = both
        self.length = min(self.capacity, self.length + k.shape[1])


MaskOrCache = BlockCausalMask | LayerKVCache | None  # of a whole clip, of a stream, or all frames see each other


class LayerPast(NamedTuple):
    """What the three attentions along time of one block see of the past."""

    video: MaskOrCache = None
    mouse: MaskOrCache = None
    keyboard: MaskOrCache = None


@dataclass
class KVCache:
    """The state of one stream, or of a batch of them that advance together."""

    layers: list[LayerPast]
    image_kv: list[tuple[Tensor, Tensor] | None]  # per block: keys and values (b m a e) of the image tokens
    grid: tuple[int, int, int]  # samples, rows and columns of patches that it is for
    position: int = 0  # latent frames appended so far

    @property
    def length(self) -> int:
        """Frames of the past that the next block sees."""
        video = self.layers[0].video
        assert isinstance(video, LayerKVCache)
        return video.length


def attend_along_time(
    qkv: tuple[Tensor, Tensor, Tensor],
    rotation: Tensor,
    past: MaskOrCache,
    update_cache: bool = False,
    backend: AttentionBackend = "sdpa",
) -> Tensor:
    """Attention (b f t a e) of queries (b f t a e) to keys and values (b f u a e) of their frames and of the past.

    `rotation` (g t 1 e'), or (g 1 1 e') for all tokens of a frame alike, places the newest g frames in time; g is f,
    or with positions relative to a window as many as the window shows. `update_cache` appends the frames to a cache.
    """
    q, k, v = qkv
    relative, newest = past is not None and past.rule.relative, rotation[len(rotation) - q.shape[1] :]
    if isinstance(past, LayerKVCache):
        fresh = k if relative else rotate(k, newest)  # a position that is counted inside the window changes as it moves
        known_k, known_v = past.read()
        keys, values = torch.cat([known_k, fresh], dim=1), torch.cat([known_v, v], dim=1)
        keys = rotate(keys, rotation) if relative else keys
        attended = _attend_tokens(rotate(q, newest), keys, values, None, backend)
        if update_cache:
            past.append(fresh, v)
        return attended
    if past is not None and relative and past.rule.sink:
        return _attend_relatively(qkv, rotation, past, backend)
    return _attend_tokens(rotate(q, rotation), rotate(k, rotation), v, past, backend)


def _attend_tokens(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None, backend: AttentionBackend) -> Tensor:
    frames = q.shape[1]
    q, k, v = (rearrange(x, "b f t a e -> b (f t) a e") for x in (q, k, v))
    return rearrange(attend(q, k, v, mask, backend), "b (f t) a e -> b f t a e", f=frames)


def _attend_relatively(
    qkv: tuple[Tensor, Tensor, Tensor], rotation: Tensor, mask: BlockCausalMask, backend: AttentionBackend
) -> Tensor:
    """Block after block as a stream would: with a sink, the distance to it depends on the block that looks."""
    q, k, v = qkv
    attended = []
    for block, ranges in mask.blocks():
        keys, values = (torch.cat([x[:, frames] for frames in ranges], dim=1) for x in (k, v))
        shown, length = keys.shape[1], block.stop - block.start
        queries = rotate(q[:, block], rotation[shown - length : shown])
        attended.append(_attend_tokens(queries, rotate(keys, rotation[:shown]), values, None, backend))
    return torch.cat(attended, dim=1)
