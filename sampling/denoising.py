"""Noise to clean latents: Euler steps, or the few steps of a distilled model; classifier-free guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from model.flow import FlowMatch
from model.limits import BELOW_1, require_between

Velocity = Callable[[Tensor, Tensor], Tensor]  # of latents x (b c f h w) at timesteps (b), of x's shape
Rows = tuple[Tensor, Tensor]  # keyboard (b n k) and mouse (b n 2), one row per frame


@dataclass(frozen=True)
class Denoising:
    """How a chunk or block is made from noise."""

    steps: int = 8  # Euler steps of the ODE
    few_steps: tuple[int, ...] = ()  # streaming, instead: the list of a few-step model, such as 1000, 666, 333
    context_noise: float | None = None  # streaming: level of finished blocks in the caches; None: the model's own
    guidance: float = 1.0  # by actions (`cfg`); 1: the model as it is

    def __post_init__(self) -> None:
        require_between("", 1, 1000, steps=self.steps)  # training draws from as many levels
        require_between("", 1e-3, 100, guidance=self.guidance)
        require_between("", 0, BELOW_1, context_noise=self.context_noise or 0)
        if any(after >= before for before, after in pairwise(self.few_steps)):
            raise UserError(f"few_steps {list(self.few_steps)[:10]} must descend, as in [1000,666,333]")


def cfg(velocity: Callable[[Rows], Velocity], actions: Rows, made: int, guidance: float) -> Velocity:
    """Classifier-free guidance by actions: v_uncond + guidance (v_cond - v_uncond), as in arXiv 2207.12598.

    For v_uncond nothing is pressed and the mouse is still in the last `made` rows of `actions`, the frames that are
    being made. Above 1 the picture answers more clearly than the model alone would have it, at twice the passes.
    """
    cond = velocity(actions)
    if guidance == 1 or not any(rows.shape[-1] for rows in actions):
        return cond
    keyboard, mouse = (F.pad(rows[:, :-made], (0, 0, 0, made)) for rows in actions)
    uncond = velocity((keyboard, mouse))

    def guided(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.lerp(uncond(x, timestep), cond(x, timestep), guidance)

    return guided


def integrate(velocity: Velocity, flow: FlowMatch, noise: Tensor, steps: int, known: Tensor | None = None) -> Tensor:
    """Clean latents (b c f h w) from `noise` in Euler steps; the first m stay `known` (b c m h w), at every level."""
    levels = flow.schedule(steps).levels.to(noise.device)
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
    noised again for the next. `draw(i)` (b c f h w) is the noise of level i; the first m latents stay `known`."""
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
