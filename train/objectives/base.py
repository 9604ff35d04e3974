"""Image to one chunk: 9 frames = 3 latents, one noise level per sample, the first frame given."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch, latent_ends
from model.actions import action_windows
from model.conditioning import condition
from model.flow import FlowMatch
from train.objectives.draws import Draws

CHUNK_LATENTS = 3


@dataclass(frozen=True)
class Figures:
    """Per sample, detached: what the loss was made of."""

    loss: Tensor  # (b) velocity error of the latents the objective is after
    sigma: Tensor  # (b)


@dataclass(frozen=True)
class Base:
    """Velocity loss of a 3-latent chunk that follows its own first frame."""

    chunks_per_clip: int = 2  # a clip of the chunked layout holds this many; each serves in turn

    def loss(
        self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Figures]:
        """The mean squared velocity error and its parts; `progress` in [0, 1] is unused here."""
        chunk = int(torch.randint(self.chunks_per_clip, (1,), generator=draws.shared))
        latents, frames = slice(3 * chunk, 3 * chunk + 3), slice(9 * chunk, 9 * chunk + 9)
        x0, keyboard, mouse = batch.latents[:, :, latents], batch.keyboard[:, frames], batch.mouse[:, frames]
        error, sigma = velocity_error(model, flow, x0, (keyboard, mouse), 1, draws)
        per_sample = error[:, 1:].mean(dim=1)  # the given latent is no achievement
        return error.mean(), Figures(per_sample.detach(), sigma)


def velocity_error(
    model: nn.Module,
    flow: FlowMatch,
    x0: Tensor,
    actions: tuple[Tensor, Tensor],
    known: int,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """Squared velocity error (b f) per latent frame and the noise level (b), for one draw of level and noise.

    `x0` (b c f h w) clean latents of the chunked layout, `actions` keyboard (b n k) and mouse (b n 2) of their frames;
    the first `known` latents are handed to the model clean, and noised like all others.
    """
    x0 = x0.float()
    sigma, _ = draws.sigma(flow.schedule(flow.config.train_steps, training=True))
    sigma = sigma.to(x0.device)
    noise = draws.noise(x0)
    ends = latent_ends("chunked", x0.shape[2])
    keyboard, mouse = (action_windows(rows, ends) if rows.shape[-1] else None for rows in actions)
    noisy = flow.add_noise(x0, noise, sigma)
    velocity = model(noisy, 1000 * sigma, condition(x0, known), keyboard, mouse)
    error = (velocity.float() - flow.training_target(x0, noise)).square()
    return error.mean(dim=(1, 3, 4)), sigma
