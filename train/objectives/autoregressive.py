"""Chunk after chunk: 18 frames = a context chunk and the target chunk that follows it, in one 6-latent sequence."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from configs import within
from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.layout import CHUNK_LATENTS
from model.loss import velocity_error
from train.objectives.base import Base
from train.objectives.objective import Loss, LossMetrics, Objective, SampleRng


@dataclass(frozen=True)
class Autoregressive(Objective):
    """The squared velocity error of a chunk that follows a given one, whose slots are at the current noise level."""

    context_weight: float = within(0, 1, 0.3)  # of the context's loss during the curriculum; the target has the rest
    curriculum: float = within(0, 1, 1 / 3)  # share of training with the context's loss; afterwards the target alone
    base_share: float = within(0, 1, 0.1)  # of steps that train the first chunk from a frame, lest it be forgotten
    context_noise: float = within(0, 1, 0.0)  # largest noise level of the given context, against drift in long rollouts

    known = CHUNK_LATENTS

    def loss(self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng) -> Loss:
        if float(torch.rand(1, generator=rng.shared)) < self.base_share:
            return Base().loss(model, flow, batch, progress, rng)
        latents = batch.latents.float()
        if self.context_noise:
            context, target = latents.split([CHUNK_LATENTS, latents.shape[2] - CHUNK_LATENTS], dim=2)
            share = torch.cat([torch.rand(1, generator=generator) for generator in rng.samples]).to(latents.device)
            noised = flow.add_noise(context, rng.noise(context), self.context_noise * share)
            latents = torch.cat([noised, target], dim=2)
        noise = rng.noise_sample(latents, flow)
        error = velocity_error(model, flow, replace(batch, latents=latents), CHUNK_LATENTS, noise)
        loss = error[:, CHUNK_LATENTS:].mean()
        if progress < self.curriculum:
            loss = self.context_weight * error[:, :CHUNK_LATENTS].mean() + (1 - self.context_weight) * loss
        return loss, LossMetrics.of(error, noise, CHUNK_LATENTS)
