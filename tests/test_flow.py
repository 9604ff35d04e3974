"""Flow matching: one sign, one direction of time."""

import pytest
import torch
from tiny_model import SMOKE

from configs import load_config
from model.config import ModelConfig
from model.flow import FlowMatch, FlowMatchConfig


def flow(**settings: float | bool) -> FlowMatch:
    return FlowMatch(FlowMatchConfig(**settings))  # pyright: ignore[reportArgumentType]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 3, 2, 2)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_a_step_with_mixed_indices_moves_every_sample_to_its_own_next_level() -> None:
    x, velocity = pair()
    schedule = flow().schedule(10)
    timestep = schedule.timesteps[[3, 9]]  # the second sample is at the last level
    ours = flow().step(x, velocity, schedule.sigma(timestep), schedule.levels[schedule.index(timestep) + 1])
    # Upstream sends the whole batch to sigma 0 when any of its samples is at the last level.
    upstream = flow().step(x, velocity, schedule.sigma(timestep), torch.zeros(2))
    alone = x[0] + velocity[0] * (schedule.sigmas[4] - schedule.sigmas[3])
    assert torch.equal(ours[0], alone)
    assert not torch.allclose(upstream[0], alone, atol=0.1)
    assert torch.equal(ours[1], upstream[1])


def test_the_default_schedule_starts_at_pure_noise_and_never_reaches_the_data() -> None:
    schedule = flow().schedule(1000)
    assert schedule.sigmas[0] == 1 and (schedule.sigmas.diff() < 0).all()
    assert abs(schedule.sigmas[-1].item() - 0.00498) < 1e-5
    assert torch.equal(schedule.timesteps, 1000 * schedule.sigmas)
    assert abs(schedule.training_weight(schedule.timesteps).mean().item() - 1) < 1e-5


def test_few_step_lists_are_warped_as_the_released_students_need() -> None:
    assert flow().warp([1000, 666, 333]).tolist() == pytest.approx([1000, 908.842712, 713.979431], rel=1e-6)
    assert flow().warp([1000, 750, 500, 250]).tolist() == pytest.approx([1000, 937.5, 833.333313, 625], rel=1e-6)
    with pytest.raises(ValueError, match="between 0 and 1000"):
        flow().warp([1001])


def test_the_true_velocity_leads_to_the_data_from_any_level() -> None:
    x0, noise = pair()
    sigma = torch.tensor([0.3, 0.9])
    x = flow().add_noise(x0, noise, sigma)
    assert torch.allclose(flow().velocity_to_x0(noise - x0, x, sigma), x0, atol=1e-6)


def test_a_level_per_latent_frame_noises_every_frame_by_itself() -> None:
    x0, noise = pair()
    sigma = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    x = flow().add_noise(x0, noise, sigma)
    for frame in range(3):
        alone = flow().add_noise(x0[:, :, frame], noise[:, :, frame], sigma[:, frame])
        assert torch.equal(x[:, :, frame], alone)


@pytest.mark.parametrize("setting", ["shift=0", "sigma_min=1", "sigma_max=2"])
def test_impossible_noise_levels_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"flow.{setting}"):
        load_config(ModelConfig, [SMOKE, f"flow.{setting}"])
