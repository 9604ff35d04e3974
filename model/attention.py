"""The one attention call, and what can compute it on this machine."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from configs.errors import UserError
from model.masks import BlockCausalMask, dense_mask, flex_mask, window_mask

AttentionBackend = Literal["sdpa", "dense", "flex", "flash_attn"]
FEW_KEYS: AttentionBackend = "dense"  # the fastest where a query sees a few frames alone, see `_dense`
Backend = Callable[[Tensor, Tensor, Tensor, BlockCausalMask | None], Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None = None, backend: AttentionBackend = "sdpa"
) -> Tensor:
    """softmax(q k / sqrt(e)) v (b l a e) for queries (b l a e), keys and values (b m a e) that `mask` lets them see."""
    return BACKENDS[backend](q, k, v, mask)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None, whole: Callable[..., Tensor]) -> Tensor:
    """The mask as one unmasked call per block over the keys that it sees: no kernel needs to know of masks, and
    nothing is computed that a mask would throw away."""
    if mask is None:
        return whole(q, k, v)
    attended = []
    for block, ranges in mask.blocks():
        queries = q[:, block.start * mask.queries : block.stop * mask.queries]
        seen = [slice(frames.start * mask.keys, frames.stop * mask.keys) for frames in ranges]
        keys, values = (torch.cat([x[:, tokens] for tokens in seen], dim=1) for x in (k, v))
        attended.append(whole(queries, keys, values))
    return torch.cat(attended, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None) -> Tensor:
    return _by_blocks(q, k, v, mask, _sdpa_whole)


def _sdpa_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rearrange(x, "b l a e -> b a l e") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b a l e -> b l a e")


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None) -> Tensor:
    """Two products and a softmax: for few keys, and for bf16 on a CPU.

    Forward and backward on one CPU core, torch 2.13, batch 8: 360 tokens of 4 heads in bf16 28 ms against 68 ms for
    SDPA (in fp32 87 against 59); 60 positions x 6 frames of 2 heads along time 3.2 against 10.7 ms (fp32 6.5 : 9.1).
    9 frames of 60 tokens in blocks of 3, batch 4, bf16: 34 ms block by block against 74 ms with the mask.
    """
    if mask is not None and mask.keys == 1:
        return _dense_whole(q, k, v, dense_mask(mask, q.device))
    if mask is not None and mask.doubled and mask.rule.window and not mask.rule.sink:
        return _by_windows(q, k, v, mask, mask.rule.window)
    return _by_blocks(q, k, v, mask, _dense_whole)


def _dense_whole(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    scores = torch.einsum("blae,bmae->balm", q * q.shape[-1] ** -0.5, k)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("balm,bmae->blae", scores.softmax(dim=-1), v)


def _by_windows(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask, window: int) -> Tensor:
    """All blocks of a doubled clip in one call: the queries of both halves of a block, over the window of the first
    half that ends with it and over the block's own second half. Where the loop over blocks takes a slice each, whose
    gradients are as many whole tensors, this takes one."""
    n, blocks = mask.rule.block * mask.queries, mask.frames // mask.rule.block
    halves = (rearrange(x, "b (two l) a e -> two b l a e", two=2) for x in (k, v))
    parts = []
    for past, own in halves:
        padded = F.pad(past, (0, 0, 0, 0, window * mask.keys - n, 0))
        frames = rearrange(padded, "b (f m) a e -> b f m a e", m=mask.keys)
        shown = [frames[:, first :: mask.rule.block][:, :blocks] for first in range(window)]
        own = rearrange(own, "b (i f m) a e -> f b i m a e", i=blocks, m=mask.keys)
        parts.append(rearrange([*shown, *own], "f b i m a e -> (b i) (f m) a e"))
    queries = rearrange(q, "b (two i l) a e -> (b i) (two l) a e", two=2, i=blocks)
    seen = window_mask(mask, q.device).repeat(len(q), 1, 1)[:, None]
    attended = _dense_whole(queries, parts[0], parts[1], seen)
    return rearrange(attended, "(b i) (two l) a e -> b (two i l) a e", two=2, i=blocks)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None) -> Tensor:
    """One fused kernel that skips what the mask hides; lengths need no padding. Without a mask it is SDPA."""
    if mask is None:
        return _sdpa_whole(q, k, v)
    if not q.is_cuda and torch.is_grad_enabled() and q.requires_grad:
        raise UserError("attention=flex trains on a CUDA GPU only (it has no backward pass here); use attention=sdpa")
    compute: Callable[..., Any] = _compiled_flex() if q.is_cuda else flex_attention
    q, k, v = (rearrange(x, "b l a e -> b a l e") for x in (q, k, v))
    return rearrange(compute(q, k, v, block_mask=flex_mask(mask, q.device)), "b a l e -> b l a e")


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)  # uncompiled it holds all scores in memory


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None) -> Tensor:
    compute = flash_function()
    if compute is None or not torch.cuda.is_available():
        raise UserError(
            "attention=flash_attn needs a CUDA GPU and FlashAttention: pip install flash-attn --no-build-isolation, or "
            "flash_attn_interface from its hopper folder; use attention=sdpa without them"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        return _sdpa(q, k, v, mask)  # FlashAttention has no kernel for float32
    return flash_attention(q, k, v, mask, compute)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask | None, compute: Callable[..., Any]
) -> Tensor:
    """FlashAttention's function `compute` as a backend; the first releases of FlashAttention 3 return (output,
    logsumexp), newer ones the output alone."""

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = compute(q, k, v)
        return output[0] if isinstance(output, tuple) else output

    return _by_blocks(q, k, v, mask, whole)


@cache
def flash_function() -> Callable[..., Any] | None:
    """FlashAttention 3's function on Hopper, else FlashAttention 2's, else None. Imported at the first call.

    The function itself is asked for: the PyPI packages flash-attn-4 (a namespace without it) and flash-attn-interface
    (an empty placeholder) make `import flash_attn` and find_spec succeed for nothing.
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    for module in ("flash_attn_interface", "flash_attn") if hopper else ("flash_attn",):
        try:
            return import_module(module).flash_attn_func
        except (ImportError, AttributeError, OSError, RuntimeError):  # OSError, RuntimeError: of another torch or CUDA
            continue
    return None


BACKENDS: dict[AttentionBackend, Backend] = {"sdpa": _sdpa, "dense": _dense, "flex": _flex, "flash_attn": _flash_attn}
