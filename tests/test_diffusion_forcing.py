"""The objective of the causal model."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_model import TINY, awake
from torch import Tensor

from configs.errors import UserError
from data_pipeline.types import Batch
from model.flow import FlowMatch, FlowMatchConfig
from model.inputs import condition
from model.loss import velocity_error
from model.masks import CausalConfig
from train.metrics import loss_metrics, loss_sums
from train.objectives import check_objective, make_objective
from train.objectives.autoregressive import Autoregressive
from train.objectives.base import Base
from train.objectives.diffusion_forcing import DiffusionForcing
from train.objectives.objective import rng_for_step

FLOW = FlowMatch(FlowMatchConfig())
CAUSAL = replace(TINY, causal=CausalConfig(block=3, window=6))


def clips(b: int = 2, f: int = 9, seed: int = 0) -> Batch:
    """Continuous clips: 1 + 4 (f - 1) frames of actions."""
    generator = torch.Generator().manual_seed(seed)
    n = 1 + 4 * (f - 1)
    latents = torch.randn(b, 16, f, 4, 6, generator=generator)
    keyboard, mouse = torch.rand(b, n, 4, generator=generator).round(), torch.randn(b, n, 2, generator=generator)
    return Batch(latents, keyboard, mouse, tuple(f"episode{i}:0" for i in range(b)))


def test_every_block_of_every_clip_has_a_noise_level_of_its_own() -> None:
    batch = clips(b=4)
    sigma = DiffusionForcing().noise_sample(batch.latents, FLOW, rng_for_step(0, 0, 0, 4)).sigma
    assert sigma.shape == (4, 9) and torch.equal(sigma, sigma[:, ::3].repeat_interleave(3, dim=1))
    assert len(sigma.unique()) == 12  # four clips of three blocks
    assert torch.isin(sigma, FLOW.schedule(1000).sigmas).all()


def test_a_clip_has_the_same_numbers_whatever_rank_and_batch_it_is_in() -> None:
    objective, latents = DiffusionForcing(context_share=0.5, context_noise=0.2), clips(b=4).latents
    whole = objective.noise_sample(latents, FLOW, rng_for_step(7, 0, 0, 4))
    for rank in range(2):  # the second step's sample 2 is the first of rank 1
        part = objective.noise_sample(latents[2 * rank : 2 * rank + 2], FLOW, rng_for_step(7, 0, 2 * rank, 2))
        assert torch.equal(part.sigma, whole.sigma[2 * rank : 2 * rank + 2])
        assert torch.equal(part.noise, whole.noise[2 * rank : 2 * rank + 2])


def test_the_loss_weighs_the_error_of_each_frame_by_its_level() -> None:
    batch, objective, dit, calls = clips(), DiffusionForcing(), awake(CAUSAL), []
    dit.register_forward_pre_hook(lambda _, args, rest: calls.append((args[1], rest["cond"])), with_kwargs=True)
    loss, metrics = objective.loss(dit, FLOW, batch, 0.0, rng_for_step(0, 0, 0, 2))
    noise = objective.noise_sample(batch.latents, FLOW, rng_for_step(0, 0, 0, 2))
    timestep, cond = calls[0]
    assert torch.equal(timestep, 1000 * noise.sigma) and torch.equal(cond, condition(batch.latents, 1))
    error = velocity_error(dit, FLOW, batch, 1, noise, "continuous")
    weight = FLOW.schedule(1000).training_weight(timestep)
    assert loss.item() == pytest.approx((error * weight).mean().item(), rel=1e-5) and not weight.eq(1).all()
    assert torch.equal(metrics.loss, error[:, 1:])
    logged = loss_metrics(loss_sums([metrics], clip_latents=9), loss_group=3)
    assert logged["loss"] == pytest.approx(metrics.loss.mean().item())
    blocks = [metrics.loss[:, part].mean().item() for part in (slice(0, 2), slice(2, 5), slice(5, 8))]
    assert [logged[f"loss/block_{i}"] for i in range(3)] == pytest.approx(blocks)  # the given frame counts in none


def test_a_share_of_clips_has_a_nearly_clean_past() -> None:
    def levels(share: float) -> Tensor:
        """Of 64 clips of three blocks (64 3)."""
        objective = DiffusionForcing(context_share=share, context_noise=0.1)
        return objective.noise_sample(torch.zeros(64, 1, 9, 1, 1), FLOW, rng_for_step(0, 0, 0, 64)).sigma[:, ::3]

    sigma = levels(share=1.0)
    past = (sigma <= 0.1).sum(dim=1)
    for count in range(3):  # of three blocks none, one or two are the past, never the last
        assert (past == count).float().mean() > 0.15
    known = sigma[past == 2, :2]
    assert torch.equal(known[:, 0], known[:, 1]) and len(known.unique()) == len(known)
    assert (levels(share=0.0) < 0.1).float().mean() < 0.1


def test_no_block_learns_from_the_future() -> None:
    dit, batch = awake(CAUSAL), clips(b=1)
    _, metrics = DiffusionForcing().loss(dit, FLOW, batch, 0.0, rng_for_step(0, 0, 0, 1))
    later = batch.latents.detach().clone()
    later[:, :, 6:] += 1
    _, changed = DiffusionForcing().loss(dit, FLOW, replace(batch, latents=later), 0.0, rng_for_step(0, 0, 0, 1))
    ours, theirs = metrics.loss[0], changed.loss[0]
    assert torch.equal(ours[:5], theirs[:5]) and not torch.equal(ours[5:], theirs[5:])


FORCING = make_objective({"name": "diffusion_forcing", "context_share": 0.5})


@pytest.mark.parametrize(
    ("objective", "model", "clips", "fault"),
    [
        (FORCING, CAUSAL, ("continuous", 21), None),
        (Base(), TINY, ("chunked", 6), None),
        (FORCING, TINY, ("continuous", 21), r"with model\.causal.*not causal"),
        (FORCING, CAUSAL, ("chunked", 6), "layout continuous.*chunked"),
        (FORCING, CAUSAL, ("continuous", 20), "divide the clips'"),
        (DiffusionForcing(block=2), CAUSAL, ("continuous", 6), "must be equal"),
        (Base(), CAUSAL, ("chunked", 6), r"without model\.causal.*is causal"),
        (Autoregressive(), TINY, ("continuous", 6), "layout chunked.*are continuous"),
    ],
)
def test_an_objective_for_another_model_or_other_clips_is_refused_in_one_line(objective, model, clips, fault) -> None:
    with pytest.raises(UserError, match=fault) if fault else nullcontext() as error:
        check_objective(objective, model, *clips)
    assert error is None or "\n" not in str(error.value)
