"""What a stream's cache holds, and what it never does."""

from dataclasses import replace

import pytest
import torch
from tiny_model import CAUSAL, H, W, awake, frames, inputs

from model.kv_cache import KVCache, LayerKVCache
from model.masks import BlockCausal, CausalConfig


def buffers(cache: KVCache) -> list[torch.Tensor]:
    caches = [cache for layer in cache.layers for cache in layer if isinstance(cache, LayerKVCache)]
    return [buffer for cache in caches for buffer in (cache.k, cache.v)]


@torch.no_grad()
def test_reading_a_cache_changes_nothing_and_keeping_does() -> None:
    dit = awake(CAUSAL)
    given, cache = inputs(CAUSAL, f=9), dit.make_cache(1, H, W)
    dit(**frames(given, slice(0, 3)), cache=cache, update_cache=True)
    before, second = [buffer.clone() for buffer in buffers(cache)], frames(given, slice(3, 6))
    once, twice = dit(**second, cache=cache), dit(**second, cache=cache)
    assert torch.equal(once, twice) and cache.position == 3 and cache.length == 3
    assert all(torch.equal(a, b) for a, b in zip(buffers(cache), before, strict=True))
    assert torch.equal(dit(**second, cache=cache, update_cache=True), once) and cache.position == 6
    assert not any(torch.equal(a, b) for a, b in zip(buffers(cache), before, strict=True))


@torch.no_grad()
def test_buffers_keep_their_address_and_size() -> None:
    dit = awake(CAUSAL)
    cache, given = dit.make_cache(1, H, W), inputs(CAUSAL, f=3)
    addresses = [(buffer.data_ptr(), buffer.shape) for buffer in buffers(cache)]
    for _ in range(5):
        dit(**given, cache=cache, update_cache=True)
    assert [(buffer.data_ptr(), buffer.shape) for buffer in buffers(cache)] == addresses
    assert cache.position == 15 and cache.length == 3


def test_nothing_is_allocated_where_there_is_no_action_module_and_keys_are_not_held_per_position() -> None:
    assert CAUSAL.action is not None
    cache = awake(replace(CAUSAL, action=replace(CAUSAL.action, blocks=(1,)))).make_cache(2, H, W)
    assert cache.layers[0].mouse is None and cache.layers[0].keyboard is None
    mouse, keyboard = cache.layers[1].mouse, cache.layers[1].keyboard
    positions = H // 2 * W // 2
    assert isinstance(mouse, LayerKVCache) and isinstance(keyboard, LayerKVCache)
    assert mouse.k.shape[:3] == (2 * positions, 3, 1) and keyboard.k.shape[:3] == (2, 3, 1)
    keyboard_only = replace(CAUSAL, action=replace(CAUSAL.action, enable_mouse=False))
    assert all(layer.mouse is None for layer in awake(keyboard_only).make_cache(1, H, W).layers)


@pytest.mark.parametrize("sink", [0, 1, 2])
def test_a_full_window_keeps_the_sink_and_the_newest_frames_in_order(sink: int) -> None:
    window = LayerKVCache(BlockCausal(block=2, window=6, sink=sink), (1, 1, 1, 1), torch.zeros(1))
    for start in range(0, 10, 2):
        numbers = torch.tensor([float(start), start + 1])[None, :, None, None, None]
        window.append(numbers, -numbers)
    expected = [*range(sink), *range(6 + sink, 10)]
    k, v = window.read()
    assert k.flatten().tolist() == expected and torch.equal(v, -k)


def test_a_window_of_one_block_holds_nothing() -> None:
    window = LayerKVCache(BlockCausal(block=2, window=2), (1, 1, 1, 1), torch.zeros(1))
    window.append(*torch.ones(2, 1, 2, 1, 1, 1))
    assert window.length == 0 and window.read()[0].shape[1] == 0


@torch.no_grad()
def test_relative_positions_do_not_grow_with_time() -> None:
    dit = awake(replace(CAUSAL, causal=CausalConfig(3, 6, sink=1, action_sink=1, positions="relative")))
    cache, given = dit.make_cache(1, H, W), inputs(CAUSAL, f=3)
    dit(**given, cache=cache, update_cache=True)
    made = [dit(**given, cache=cache, update_cache=True) for _ in range(8)]
    # Once all that the window shows has been replaced in every layer, an hour more changes nothing.
    assert torch.equal(made[-1], made[-2])


@torch.no_grad()
def test_a_stream_in_bf16_has_buffers_in_bf16() -> None:
    dit = awake(CAUSAL).to(torch.bfloat16)
    cache, given = dit.make_cache(1, H, W), inputs(CAUSAL, f=3)
    first = dit(**given, cache=cache, update_cache=True)
    assert first.dtype == torch.float32 and dit(**given, cache=cache).isfinite().all()
    assert {buffer.dtype for buffer in buffers(cache)} == {torch.bfloat16}


def test_what_cannot_stream_or_does_not_fit_the_cache_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="not trained causally"):
        awake(replace(CAUSAL, causal=None)).make_cache(1, H, W)
    with pytest.raises(ValueError, match="window=null"):
        awake(replace(CAUSAL, causal=CausalConfig(3))).make_cache(1, H, W)
    dit = awake(CAUSAL)
    for wrong in (inputs(CAUSAL, f=2), inputs(CAUSAL, b=2), inputs(CAUSAL, h=H + 2)):
        with pytest.raises(ValueError, match="samples, rows, columns of patches and latents"):
            dit(**wrong, cache=dit.make_cache(1, H, W))
