"""Chunk after chunk: 18 frames = a context chunk and the target chunk that follows it, in one 6-latent sequence."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.layout import CHUNK_LATENTS
from model.loss import velocity_error
from train.config import Ranged, within
from train.objectives.base import Base
from train.objectives.objective import Loss, LossMetrics, Objective, SampleRng


@dataclass(frozen=True)
class Autoregressive(Objective, Ranged):
    """Velocity loss of a chunk that follows a given one; context slots carry the context at the current noise level."""

    context_weight: float = within(0, 1, 0.3)  # of the context's loss during the curriculum; the target has the rest
    curriculum: float = within(0, 1, 1 / 3)  # share of training with the context's loss; afterwards the target alone
    base_share: float = within(0, 1, 0.1)  # of steps that train the first chunk from a frame, lest it be forgotten
    context_noise: float = within(0, 1, 0.0)  # largest noise level of the given context, against drift in long rollouts

    section = "objective."
    known = CHUNK_LATENTS

    def loss(self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng) -> Loss:
        """The weighted squared velocity error; `progress` drives the curriculum."""
        if float(torch.rand(1, generator=rng.shared)) < self.base_share:
            return Base().loss(model, flow, batch, progress, rng)
        batch = replace(batch, latents=self._noised_context(batch.latents.float(), flow, rng))
        noise = rng.noise_sample(batch.latents, flow)
        error = velocity_error(model, flow, batch, CHUNK_LATENTS, noise)
        loss = error[:, CHUNK_LATENTS:].mean()
        if progress < self.curriculum:
            loss = self.context_weight * error[:, :CHUNK_LATENTS].mean() + (1 - self.context_weight) * loss
        return loss, LossMetrics.of(error, noise, CHUNK_LATENTS)

    def _noised_context(self, latents: Tensor, flow: FlowMatch, rng: SampleRng) -> Tensor:
        if not self.context_noise:
            return latents
        context = latents[:, :, :CHUNK_LATENTS]
        sigma = self.context_noise * rng.uniform().to(latents.device)
        noised = flow.add_noise(context, rng.noise(context), sigma)
        return torch.cat([noised, latents[:, :, CHUNK_LATENTS:]], dim=2)
