"""Teacher forcing: blocks from a past of their own, as a rollout makes them; and the latent before as conditioning."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_causal import stream
from test_diffusion_forcing import clips
from test_streaming import passes_of
from tiny_model import CAUSAL, awake, frames, inputs
from tiny_world import random_video, random_world
from torch import Tensor

from model.action_dit import ActionDiT
from model.attention import attend
from model.flow import FlowMatch, FlowMatchConfig
from model.inputs import MASK_CHANNELS, condition_on_last, known_at
from model.loss import NoiseSample, velocity_error
from model.masks import BlockCausal, BlockCausalMask, CausalConfig
from sampling.denoising import Denoising
from sampling.streaming import StreamingRollout
from train.objectives.objective import rng_for_step
from train.objectives.teacher_forcing import TeacherForcing

FLOW = FlowMatch(FlowMatchConfig(shift=1.0))
assert CAUSAL.action
SIDE_PATHS = replace(CAUSAL.action, time_path=True, place_path=True)
RULES = [
    CausalConfig(1, 3),
    CausalConfig(2, 5),
    CausalConfig(2, 5, 1),
    CausalConfig(3, 6),
    CausalConfig(2, 5, 1, 1, "relative"),
]


def model(causal: CausalConfig, layers: int = 2) -> ActionDiT:
    """A model with every side path, none of whose tensors is zero."""
    action = replace(SIDE_PATHS, blocks=SIDE_PATHS.blocks[: layers - 1])
    return awake(replace(CAUSAL, num_layers=layers, action=action, borders=4, causal=causal))


def doubled(past: dict[str, Tensor], noisy: dict[str, Tensor]) -> dict[str, Tensor]:
    axis = {"x": 2, "cond": 2, "timestep": 1, "keyboard": 1, "mouse": 1}
    return {name: torch.cat([past[name], noisy[name]], dim=axis[name]) for name in axis}


@torch.no_grad()
@pytest.mark.parametrize("causal", RULES)
def test_a_block_from_the_clean_half_is_what_a_stream_makes_from_its_caches(causal: CausalConfig) -> None:
    dit, f = model(causal), 4 * causal.block
    past, noisy = inputs(dit.config, f=f), inputs(dit.config, f=f)
    noisy |= {"x": noisy["x"] + 1, "timestep": noisy["timestep"].flip(1) + 7}
    both = dit(**doubled(past, noisy), doubled=True)
    assert torch.allclose(both[:, :, :f], dit(**past), rtol=1e-4, atol=1e-4)
    cache = dit.make_cache(1, past["x"].shape[3], past["x"].shape[4])
    for start in range(0, f, causal.block):
        block = slice(start, start + causal.block)
        made = dit(**frames(noisy, block), cache=cache)
        assert torch.allclose(both[:, :, f:][:, :, block], made, rtol=1e-4, atol=1e-4)  # float32 sums in another order
        dit(**frames(past, block), cache=cache, update_cache=True)


@pytest.mark.parametrize("causal", RULES)
def test_a_noisy_block_sees_itself_and_the_past_inside_its_window(causal: CausalConfig) -> None:
    dit, f = model(causal, layers=1), 4 * causal.block
    given = doubled(inputs(dit.config, f=f), inputs(dit.config, f=f))
    x = given["x"].requires_grad_()
    velocity = dit(**given, doubled=True)
    for frame in range(f):
        (gradient,) = torch.autograd.grad(velocity[:, :, f + frame].sum(), x, retain_graph=True)
        seen = gradient.abs().amax(dim=(0, 1, 3, 4)) > 0
        start = frame // causal.block * causal.block
        oldest = start + causal.block - (causal.window or 0) + causal.sink
        past = [(i >= oldest or i < causal.sink) and i < start for i in range(f)]
        assert seen.tolist() == past + [start <= i < start + causal.block for i in range(f)]


@torch.no_grad()
def test_actions_of_a_block_change_no_block_before_it() -> None:
    dit = model(CausalConfig(2, 5))
    given = doubled(inputs(dit.config, f=8), inputs(dit.config, f=8))
    before = dit(**given, doubled=True)
    for name in ("keyboard", "mouse"):
        changed = given[name].clone()
        changed[:, [4, 5, 12, 13]] += 1  # the third block, in both halves
        after = dit(**given | {name: changed}, doubled=True)
        same = (after - before).abs().amax(dim=(0, 1, 3, 4)) == 0
        assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4


@torch.no_grad()
def test_a_clean_past_of_its_own_gives_the_loss_of_the_last_block_after_a_clean_clip() -> None:
    batch, dit = clips(f=6), model(CausalConfig(2, 6, unknown="last"))
    noise = TeacherForcing(block=2, context_noise=0.0).heldout_noise(batch.latents, FLOW, rng_for_step(0, 0, 0, 2))
    last = noise.sigma.clone()
    last[:, :4] = 0
    forced = velocity_error(dit, FLOW, batch, 1, noise, "continuous")
    plain = velocity_error(dit, FLOW, batch, 1, NoiseSample(last, noise.noise), "continuous")
    assert torch.allclose(forced[:, 4:], plain[:, 4:], rtol=1e-4, atol=1e-4)


def test_the_past_is_told_one_small_level_per_clip_and_blocks_have_levels_of_their_own() -> None:
    latents = torch.zeros(64, 16, 6, 2, 2)
    noise = TeacherForcing(block=2, context_noise=0.3).heldout_noise(latents, FLOW, rng_for_step(0, 0, 0, 64))
    assert noise.past is not None
    told = noise.past.sigma
    assert torch.equal(told, told[:, :1].expand_as(told)) and 0 < told.median() < 0.15 and told.max() < 0.3
    assert torch.equal(noise.sigma[:, ::2], noise.sigma[:, 1::2]) and noise.sigma[:, ::2].unique().numel() == 64 * 3
    logits = torch.logit(noise.sigma[:, ::2].flatten())
    assert abs(logits.mean() - 0.3) < 0.25 and abs(logits.std() - 1) < 0.2  # 192 draws
    uniform = TeacherForcing(block=2, levels="uniform").heldout_noise(latents, FLOW, rng_for_step(0, 0, 0, 64)).sigma
    assert abs(uniform.mean() - 0.5) < 0.1


def test_the_last_finished_latent_is_the_conditioning_of_each_block() -> None:
    past, first = torch.randn(2, 16, 6, 2, 3), torch.randn(2, 16, 1, 2, 3)
    sigma = torch.rand(2, 6)
    cond = condition_on_last(first, past, sigma, block=2)
    assert torch.equal(cond[:, :, :2], known_at(first.expand(-1, -1, 2, -1, -1), torch.zeros(2, 2)))
    for start in (2, 4):
        given = past[:, :, start - 1 : start].expand(-1, -1, 2, -1, -1)
        block = cond[:, :, start : start + 2]
        assert torch.equal(block[:, MASK_CHANNELS:], given)
        assert torch.equal(
            block[:, :MASK_CHANNELS], (1 - sigma[:, start - 1])[:, None, None, None, None].expand(2, 4, 2, 2, 3)
        )


@torch.no_grad()
def test_side_paths_change_nothing_before_they_are_trained_and_are_no_parameters_when_off() -> None:
    without = replace(CAUSAL, action=replace(SIDE_PATHS, time_path=False, place_path=False), borders=0)
    plain = ActionDiT(without, torch.Generator().manual_seed(0))
    full = ActionDiT(replace(CAUSAL, action=SIDE_PATHS, borders=4), torch.Generator().manual_seed(0))
    for dit in (plain, full):
        torch.nn.init.normal_(dit.head.head.weight, generator=torch.Generator().manual_seed(1))
    added = full.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[0] for name in added} == {"action_time", "action_place", "borders"}
    full.load_state_dict(plain.state_dict() | {name: full.state_dict()[name] for name in added})
    given = inputs(CAUSAL, f=6)
    assert torch.equal(full(**given), plain(**given))
    assert stream(full, given).shape == given["x"].shape


@pytest.mark.parametrize("rule", [BlockCausal(1, 3), BlockCausal(2, 5), BlockCausal(3, 12)])
def test_windows_in_one_call_give_what_the_mask_gives(rule: BlockCausal) -> None:
    mask = BlockCausalMask(rule, 6, 4, 4, doubled=True)
    q, k, v = (torch.randn(2, 48, 2, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    windows, blocks = attend(q, k, v, mask, "dense"), attend(q, k, v, mask, "sdpa")
    assert torch.allclose(windows, blocks, atol=1e-6)
    weight = torch.randn_like(blocks)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (windows, blocks)), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "causal", [CausalConfig(1, 3, unknown="last"), CausalConfig(2, 4, unknown="last", context_noise=0.1)]
)
def test_a_rollout_gives_the_model_what_training_gives_it(causal: CausalConfig, codec_folder: Path) -> None:
    world, prompt = random_world(codec_folder, causal), random_video(1)[:, :, 0]
    passes = passes_of(world)
    rollout = StreamingRollout(world, prompt, [0], Denoising(steps=2))
    for _ in range(4):
        rollout.step(*(torch.zeros(1, rollout.frames_due, width) for width in (4, 2)))
    rollout.settle()
    kept = [given for given in passes if given.get("update_cache")]
    past = torch.cat([given["x"] for given in kept], dim=2)
    sigma = torch.full((1, past.shape[2]), causal.context_noise)
    trained = condition_on_last(world.codec.encode(prompt[:, :, None]).float(), past, sigma, causal.block)
    assert torch.equal(torch.cat([given["cond"] for given in kept], dim=2), trained)
    block = 0
    for given in passes:  # a block's denoising comes before it is kept
        assert torch.equal(given["cond"], kept[block]["cond"])
        block += given.get("update_cache", False)
