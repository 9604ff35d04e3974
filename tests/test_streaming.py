"""Rollouts of both kinds from within: what the model is given, and how the caches are filled."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import random_video, random_world
from torch import Tensor

from data_pipeline.types import Actions
from data_pipeline.video import to_uint8
from model.flow import FlowMatch, FlowMatchConfig
from model.inputs import action_windows, condition
from model.kv_cache import LayerKVCache
from model.masks import CausalConfig
from model.noise import seeded_noise
from model.world import WorldModel
from sampling.denoising import Denoising, denoise_in_few_steps, integrate
from sampling.play import LiveWorld, play, start_rollout
from sampling.streaming import StreamingRollout

CAUSAL = CausalConfig(block=3, window=6)


@pytest.fixture(scope="module")
def world(codec_folder: Path) -> WorldModel:
    return random_world(codec_folder, CAUSAL)


def rows(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, n, 4, generator=generator).round(), torch.randn(1, n, 2, generator=generator)


def passes_of(world: WorldModel) -> list[dict[str, Any]]:
    """The inputs of every pass of the world's model from now on, the latents and their time as `x` and `timestep`."""
    passes: list[dict[str, Any]] = []
    world.dit.register_forward_pre_hook(
        lambda dit, args, kwargs: passes.append({"x": args[0], "timestep": args[1], **kwargs}), with_kwargs=True
    )
    return passes


def frames(world: WorldModel, denoising: Denoising = Denoising(steps=2), prompt: Tensor | None = None) -> list[Tensor]:  # noqa: B008
    """Three pieces of play from `prompt`, or a picture."""
    prompt = random_video(1)[:, :, 0] if prompt is None else prompt
    return list(play(world, prompt, rows(33), (0,), denoising))


def test_known_slots_carry_the_known_latents_at_the_current_noise_level(codec_folder: Path) -> None:
    world = random_world(codec_folder)
    known = world.codec.encode(random_video(9, 1))
    rollout = start_rollout(world, random_video(9, 1), [0], Denoising(5))
    rollout.step(*rows(9))  # the prompt
    passes = passes_of(world)
    rollout.step(*rows(9))
    assert len(passes) == 5
    noise = seeded_noise((known.shape[1], 6, *known.shape[3:]), [0], 1)
    for inputs in passes:
        sigma = inputs["timestep"][0] / 1000
        expected = (1 - sigma) * known + sigma * noise[:, :, :3]
        torch.testing.assert_close(inputs["x"][:, :, :3], expected, rtol=0, atol=1e-5)  # float32
        assert torch.equal(inputs["cond"], condition(torch.cat([known, noise[:, :, 3:]], dim=2), 3))


def test_blocks_see_the_windows_and_conditions_that_a_whole_clip_has(codec_folder: Path) -> None:
    world, actions = random_world(codec_folder, CAUSAL), rows(33)
    passes = passes_of(world)
    stream = start_rollout(world, random_video(1)[:, :, 0], [0], Denoising(steps=1))
    for block, (first, last) in enumerate([(0, 9), (9, 21), (21, 33)]):
        assert stream.frames_due == last - first
        stream.step(*(stream_rows[:, first:last] for stream_rows in actions))
        stream.settle()
        ends = [4 * i for i in range(3 * block, 3 * block + 3)]
        for name, whole in zip(("keyboard", "mouse"), actions, strict=True):
            assert torch.equal(passes[-1][name], action_windows(whole, ends, 12))
    known = world.codec.encode(random_video(1))
    clip = torch.cat([known, torch.zeros_like(known).expand(-1, -1, 8, -1, -1)], dim=2)
    conds = [inputs["cond"] for inputs in passes if inputs.get("update_cache")]
    assert torch.equal(torch.cat(conds, dim=2), condition(clip, 1))


def test_a_prompt_clip_fills_the_caches_as_made_blocks_do(codec_folder: Path) -> None:
    world, video, (keyboard, mouse) = random_world(codec_folder, CAUSAL), random_video(21), rows(33)
    made = frames(world, prompt=video)
    assert torch.equal(torch.cat(made[:2], dim=1), to_uint8(world.codec.decode(world.codec.encode(video))))
    stream, passes = StreamingRollout(world, video, [0], Denoising(steps=2)), passes_of(world)
    for first, last in ((0, 9), (9, 21)):
        stream.step(keyboard[:, first:last], mouse[:, first:last])
        stream.settle()
    assert stream.cache.position == 6 and len(passes) == 2  # one pass per block: nothing is made
    assert torch.equal(stream.step(keyboard[:, 21:], mouse[:, 21:]), made[2])
    assert not torch.equal(frames(world, prompt=random_video(21, seed=1))[2], made[2])


def test_context_noise_changes_what_later_blocks_see_and_the_model_carries_its_own(
    world: WorldModel, codec_folder: Path
) -> None:
    clean, noisy = (frames(world, Denoising(steps=2, context_noise=level)) for level in (0.0, 0.2))
    assert torch.equal(clean[0], noisy[0]) and not torch.equal(clean[1], noisy[1])
    trained_with = random_world(codec_folder, replace(CAUSAL, context_noise=0.2))
    assert all(map(torch.equal, frames(trained_with), noisy))


@pytest.mark.parametrize(("denoising", "steps"), [(Denoising(steps=2), 2), (Denoising(few_steps=(1000, 666, 333)), 3)])
def test_guidance_reads_the_caches_twice(codec_folder: Path, denoising: Denoising, steps: int) -> None:
    world = random_world(codec_folder, CAUSAL)
    passes = passes_of(world)
    frames(world, replace(denoising, guidance=3.0))
    remembered = 2  # the third block is never needed
    assert len(passes) == 3 * 2 * steps + remembered
    assert sum(inputs.get("update_cache", False) for inputs in passes) == remembered


def test_unknown_latents_may_be_grey_frames(codec_folder: Path) -> None:
    world = random_world(codec_folder, replace(CAUSAL, unknown="grey"))
    stream = StreamingRollout(world, random_video(1)[:, :, 0], [0], Denoising(steps=1))
    grey = torch.cat([random_video(1), torch.zeros(1, 3, 32, 32, 48)], dim=2)
    blocks = [stream._cond, *(next(stream._conditions) for _ in range(3))]
    assert torch.equal(torch.cat(blocks[:3], dim=2)[:, 4:], world.codec.encode(grey))
    assert torch.equal(blocks[3], blocks[2])
    assert blocks[0][:, :4, 0].all() and not blocks[0][:, :4, 1:].any() and not blocks[1][:, :4].any()


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_euler_with_the_true_velocity_recovers_the_block_and_holds_what_is_known(steps: int) -> None:
    x0, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    flow = FlowMatch(FlowMatchConfig())
    assert torch.allclose(integrate(lambda x, t: noise - x0, flow, noise, steps), x0, atol=1e-5)
    clip = integrate(lambda x, t: torch.zeros_like(x), flow, noise, steps, known=x0[:, :, :1])
    assert torch.equal(clip[:, :, :1], x0[:, :, :1]) and torch.equal(clip[:, :, 1:], noise[:, :, 1:])


def test_few_steps_stand_at_the_warped_levels_and_add_new_noise() -> None:
    x0, *noises = torch.randn(4, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    flow, seen = FlowMatch(FlowMatchConfig()), []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x, float(timestep)))
        return (x - x0) / (timestep / 1000)  # the velocity of whichever noise is in x

    clip = denoise_in_few_steps(velocity, flow, noises.__getitem__, (1000, 666, 333))
    assert torch.allclose(clip, x0, atol=1e-5)
    assert [round(timestep, 4) for _, timestep in seen] == [1000.0, 908.8427, 713.9794]  # facts of the released models
    for (x, timestep), noise in zip(seen, noises, strict=True):
        sigma = timestep / 1000
        assert torch.allclose(x, (1 - sigma) * x0 + sigma * noise, atol=1e-4)


def test_a_long_rollout_needs_no_more_memory_than_a_short_one(world: WorldModel) -> None:
    live = LiveWorld(world, np.zeros((32, 48, 3), np.uint8), denoising=Denoising(few_steps=(1000,)))
    idle = Actions(np.zeros((1, 4), np.float32), np.zeros((1, 2), np.float32))

    def state_bytes() -> int:
        stream = live.rollout
        assert isinstance(stream, StreamingRollout)
        caches = [cache for layer in stream.cache.layers for cache in layer if isinstance(cache, LayerKVCache)]
        tensors = [*stream._past, *stream._decoder_state, *(x for cache in caches for x in (cache.k, cache.v))]
        return sum(tensor.nbytes for tensor in tensors)

    sizes = []
    for _ in range(22):
        live.step(idle)
        sizes.append(state_bytes())
    assert sizes[-1] == sizes[1]
