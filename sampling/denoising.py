"""Noise to clean latents, whatever makes the velocity: Euler steps, or the few steps of a distilled model."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from model.flow import FlowMatch

Velocity = Callable[[Tensor, Tensor], Tensor]  # of latents x (b c f h w) at timesteps (b), of x's shape


def integrate(velocity: Velocity, flow: FlowMatch, noise: Tensor, steps: int, known: Tensor | None = None) -> Tensor:
    """Clean latents (b c f h w) from `noise` in Euler steps; the first m stay `known` (b c m h w), at every level."""
    schedule = flow.schedule(steps)
    levels = torch.cat([schedule.sigmas, schedule.sigmas.new_tensor([schedule.end_sigma])]).to(noise.device)
    x = noise
    for sigma, sigma_next in pairwise(levels[:, None].expand(-1, len(noise))):
        x = _hold(x, _noised(flow, known, noise, sigma))
        x = flow.step(x, velocity(x, flow.config.train_steps * sigma), sigma, sigma_next)
    return _hold(x, known)


def denoise_in_few_steps(
    velocity: Velocity,
    flow: FlowMatch,
    draw: Callable[[int], Tensor],
    steps: Sequence[int],
    known: Tensor | None = None,
) -> Tensor:
    """Clean latents (b c f h w) of a few-step model: at every level of the warped list `steps` straight to x0, which is
    noised anew for the next. `draw(i)` (b c f h w) is the noise of level i; the first m latents stay `known`."""
    timesteps, x0 = flow.warp(steps), None
    sigmas = flow.schedule(flow.config.train_steps).sigma(timesteps)
    for i, (timestep, sigma) in enumerate(zip(timesteps, sigmas, strict=True)):
        noise = draw(i)
        level = sigma.to(noise.device).expand(len(noise))
        x = noise if x0 is None else flow.add_noise(x0, noise, level)
        x = _hold(x, _noised(flow, known, noise, level))
        x0 = flow.velocity_to_x0(velocity(x, timestep.to(noise.device).expand(len(noise))), x, level)
    assert x0 is not None
    return _hold(x0, known)


def _noised(flow: FlowMatch, known: Tensor | None, noise: Tensor, sigma: Tensor) -> Tensor | None:
    """`known` (b c m h w), if any, with the first of `noise` (b c f h w) at noise levels `sigma` (b)."""
    return None if known is None else flow.add_noise(known, noise[:, :, : known.shape[2]], sigma)


def _hold(x: Tensor, first: Tensor | None) -> Tensor:
    """x (b c f h w) with `first` (b c m h w), if any, in place of its first latents."""
    return x if first is None else torch.cat([first, x[:, :, first.shape[2] :]], dim=2)
