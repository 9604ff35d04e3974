"""Flow matching: noise levels, the velocity between noise and data, and the steps of the ODE.

`sigma` is in [0, 1], 1 = pure noise; x_sigma = (1 - sigma) x0 + sigma noise; the model predicts v = noise - x0;
`timestep` = train_steps * sigma, a float. The semantics are those of Matrix-Game 2.0's FlowMatchScheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs import within
from configs.errors import UserError


@dataclass(frozen=True)
class FlowMatchConfig:
    """Saved with the model's own settings, so that training and sampling cannot disagree."""

    shift: float = within(1e-3, 1e3, 5.0)  # moves noise levels towards 1; 1 leaves them as they are
    sigma_min: float = within(0, 1, 0.0)
    sigma_max: float = within(0, 1, 1.0)
    extra_one_step: bool = True  # the ramp has one point more than steps, and the last is dropped
    train_steps: int = within(1, 1_000_000, 1000)  # levels that training draws from; also timestep per unit of sigma
    inverse_timesteps: bool = False  # from data to noise
    reverse_sigmas: bool = False  # sigma counts the data's share instead of the noise's

    def __post_init__(self) -> None:
        if self.sigma_min > self.sigma_max - 1e-6:
            raise UserError(f"flow.sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")


@dataclass(frozen=True)
class Schedule:
    """Noise levels in the order in which they are visited."""

    sigmas: Tensor  # (n) float32
    timesteps: Tensor  # (n) float32
    end_sigma: float  # where the step after the last level leads: 0, or 1 when the flow runs towards noise

    @property
    def levels(self) -> Tensor:
        """The noise levels (n + 1) with the end, so that step i leads from levels[i] to levels[i + 1]."""
        return torch.cat([self.sigmas, self.sigmas.new_tensor([self.end_sigma])])

    def index(self, timestep: Tensor) -> Tensor:
        """The index of the nearest level of each timestep (...); the first one on ties."""
        table = self.timesteps.to(timestep.device)
        return (timestep[..., None].float() - table).abs().argmin(dim=-1)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level (...) nearest to each timestep (...)."""
        return self.sigmas.to(timestep.device)[self.index(timestep)]

    def training_weight(self, timestep: Tensor) -> Tensor:
        """The loss weight (...) of each timestep (...): a bell, lowered to a minimum of 0 and scaled to a mean of 1.

        Its centre and width come from n, not from the range of the timesteps, as upstream: only n = 1000 gives a bell
        over the whole range.
        """
        n = len(self.timesteps)
        bell = torch.exp(-2 * ((self.timesteps - n / 2) / n) ** 2)
        bell = bell - bell.min()
        return (bell * (n / bell.sum())).to(timestep.device)[self.index(timestep)]


class FlowMatch:
    """The flow that a `FlowMatchConfig` describes."""

    def __init__(self, config: FlowMatchConfig) -> None:
        self.config = config

    def schedule(self, n: int, denoising_strength: float = 1.0) -> Schedule:
        """`n` levels from `denoising_strength` (1 = all the way from noise) down."""
        config = self.config
        start = config.sigma_min + (config.sigma_max - config.sigma_min) * denoising_strength
        sigmas = torch.linspace(start, config.sigma_min, n + 1 if config.extra_one_step else n)[:n]
        if config.inverse_timesteps:
            sigmas = sigmas.flip(0)
        # Long clips need more noise for the same signal-to-noise ratio (SD3, arXiv 2403.03206, eq. 23).
        sigmas = config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
        if config.reverse_sigmas:
            sigmas = 1 - sigmas
        end_sigma = 1.0 if config.inverse_timesteps or config.reverse_sigmas else 0.0
        return Schedule(sigmas, sigmas * config.train_steps, end_sigma)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """(1 - sigma) x0 + sigma noise, in the dtype of `noise`; sigma (b), or (b f) for x0 (b c f h w)."""
        sigma = per_sample(sigma, noise)
        return ((1 - sigma) * x0 + sigma * noise).to(noise.dtype)

    def training_target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The velocity noise - x0, of the shape of both."""
        return noise - x0

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """x moved along `velocity` from sigma to sigma_next, each (b), or (b f) for x (b c f h w)."""
        return x + velocity * per_sample(sigma_next - sigma, x)

    def velocity_to_x0(self, velocity: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean data x - sigma velocity, computed in float64 and given in the dtype of `velocity`."""
        return (x.double() - per_sample(sigma.double(), x) * velocity.double()).to(velocity.dtype)

    def warp(self, steps: Sequence[int]) -> Tensor:
        """The timesteps (len(steps)) at which a few-step list such as 1000, 666, 333 stands after the shift."""
        count = self.config.train_steps
        if any(not 0 <= step <= count for step in steps):
            raise UserError(f"few_steps {list(steps)}: every step must be between 0 and {count}")
        table = torch.cat([self.schedule(count).timesteps, torch.zeros(1)])
        return table[count - torch.tensor(list(steps), dtype=torch.long)]


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (b) as (b 1 1 ...), or (b f) as (b 1 f 1 ...), so that it multiplies x (b ...) or (b c f ...)."""
    if sigma.ndim == 2:
        sigma = sigma[:, None]
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
