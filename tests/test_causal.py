"""The causal model over whole clips, and that a stream with caches gives the same numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_model import CAUSAL, awake, frames, inputs
from torch import Tensor

from configs import build
from model.action_dit import ActionDiT
from model.masks import BlockCausal, BlockCausalMask, CausalConfig, dense_mask, flex_mask


def stream(dit: ActionDiT, given: dict[str, Tensor]) -> Tensor:
    """The clip block by block, each kept."""
    assert dit.config.causal is not None
    x, block = given["x"], dit.config.causal.block
    cache = dit.make_cache(len(x), x.shape[3], x.shape[4], given.get("visual"))
    starts = range(0, x.shape[2], block)
    return torch.cat([dit(**frames(given, slice(i, i + block)), cache=cache, update_cache=True) for i in starts], dim=2)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("block", "window", "sink", "action_sink"),
    [
        (1, 1, 0, 0), (1, 4, 1, 1), (2, 5, 0, 0), (2, 5, 1, 0), (3, 3, 0, 0), (3, 4, 0, 0), (3, 6, 0, 0), (3, 6, 1, 1),
        (3, 7, 2, 1), (3, 12, 0, 0), (4, 9, 0, 0),
    ],
)  # fmt: skip
def test_a_stream_with_caches_gives_what_the_mask_gives(
    block: int, window: int, sink: int, action_sink: int, positions: Any
) -> None:
    dit = awake(replace(CAUSAL, causal=CausalConfig(block, window, sink, action_sink, positions)))
    given = inputs(dit.config, f=4 * block)
    # float32 sums in another order, of numbers up to 20
    assert torch.allclose(stream(dit, given), dit(**given), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_window_as_long_as_the_clip_is_no_window() -> None:
    given = inputs(CAUSAL, f=9)
    endless = awake(replace(CAUSAL, causal=CausalConfig(3, None)))
    assert torch.allclose(
        stream(awake(replace(CAUSAL, causal=CausalConfig(3, 9))), given), endless(**given), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_streams_of_a_batch_of_another_size_with_image_tokens_agree_with_the_mask() -> None:
    dit = awake(replace(CAUSAL, vision="tokens", img_dim=24))
    given = inputs(dit.config, b=3, f=12, h=6, w=2)
    assert torch.allclose(stream(dit, given), dit(**given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@pytest.mark.parametrize("causal", [CausalConfig(3, None), CausalConfig(3, 6, sink=1, positions="relative")])
def test_a_later_block_has_exactly_no_gradient_on_an_earlier_one(backend: str, causal: CausalConfig) -> None:
    dit = awake(replace(CAUSAL, attention=backend, causal=causal))
    given = inputs(dit.config, f=9)
    for name in ("x", "cond", "keyboard", "mouse"):
        given[name].requires_grad_()
    dit(**given)[:, :, 3:6].square().sum().backward()
    for name, axis in (("x", 2), ("cond", 2), ("keyboard", 1), ("mouse", 1)):
        by_frame = given[name].grad.movedim(axis, 0).flatten(1).abs().amax(dim=1)  # type: ignore[union-attr]
        assert not by_frame[6:].any() and by_frame[3:6].all()


@torch.no_grad()
def test_a_frame_sees_its_own_block_and_the_window_and_nothing_else() -> None:
    # One layer, so that nothing reaches a frame through another one.
    dit = awake(replace(CAUSAL, num_layers=1, action=None, causal=CausalConfig(2, 5, sink=1)))
    given = inputs(dit.config, f=10)
    before = dit(**given)
    for frame in range(10):
        x = given["x"].clone()
        x[:, :, frame] += 1
        changed = (dit(**given | {"x": x}) - before).abs().amax(dim=(0, 1, 3, 4)) > 1e-6
        expected = [frame < end and (frame >= end - 4 or frame < 1) for end in (2, 2, 4, 4, 6, 6, 8, 8, 10, 10)]
        assert changed.tolist() == expected


@pytest.mark.parametrize("rule", [BlockCausal(3), BlockCausal(2, 5), BlockCausal(3, 7, 2), BlockCausal(4, 4)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 1), (4, 4)])
def test_dense_mask_flex_mask_and_block_ranges_say_the_same(rule: BlockCausal, queries: int, keys: int) -> None:
    mask = BlockCausalMask(rule, 11, queries, keys)
    cpu = torch.device("cpu")
    dense, ranges = dense_mask(mask, cpu), torch.zeros(11, 11, dtype=torch.bool)
    for block, seen in mask.blocks():
        for frames_seen in seen:
            ranges[block, frames_seen] = True
    assert torch.equal(dense, ranges.repeat_interleave(queries, dim=0).repeat_interleave(keys, dim=1))
    zero = torch.zeros((), dtype=torch.long)
    rows, columns = torch.arange(11 * queries)[:, None], torch.arange(11 * keys)
    assert torch.equal(dense, flex_mask(mask, cpu).mask_mod(zero, zero, rows, columns))


@torch.no_grad()
def test_a_clip_of_one_block_is_the_bidirectional_model() -> None:
    given = inputs(CAUSAL, f=3)
    assert torch.equal(awake(CAUSAL)(**given), awake(replace(CAUSAL, causal=None))(**given))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"block": 0}, "block=0"),
        ({"block": 3, "window": 2}, "window=2"),
        ({"block": 3, "window": 6, "sink": 4}, "sink=4"),
        ({"block": 3, "window": 6, "action_sink": -1}, "action_sink=-1"),
        ({"context_noise": 1.0}, "context_noise"),
    ],
)
def test_lengths_that_do_not_fit_together_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        build(CausalConfig, settings)


@torch.no_grad()
def test_compiled_blocks_stream_the_same_numbers_under_the_same_names() -> None:
    dit = awake(CAUSAL)
    given = inputs(dit.config, f=9)
    names, eager = list(dit.state_dict()), stream(dit, given)
    dit.compile_blocks("default")
    assert list(dit.state_dict()) == names
    assert torch.allclose(stream(dit, given), eager, rtol=1e-4, atol=1e-4)
