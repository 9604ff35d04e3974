"""Image to one chunk: 9 frames = 3 latents, one noise level per sample, the first frame given."""

from dataclasses import dataclass

import torch
from torch import nn

from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.layout import CHUNK_FRAMES, CHUNK_LATENTS
from model.loss import velocity_error
from sampling.metrics import cut_clips
from train.objectives.objective import Loss, LossMetrics, Objective, SampleRng


@dataclass(frozen=True)
class Base(Objective):
    """The mean squared velocity error of a 3-latent chunk that follows its own first frame."""

    latents = CHUNK_LATENTS

    def loss(self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng) -> Loss:
        # Each chunk of a clip serves in turn; with image tokens the first alone, whose first frame they show.
        chunks = 1 if batch.visual is not None else batch.latents.shape[2] // CHUNK_LATENTS
        i = int(torch.randint(chunks, (1,), generator=rng.shared))
        latents, frames = (slice(n * i, n * (i + 1)) for n in (CHUNK_LATENTS, CHUNK_FRAMES))
        chunk = cut_clips(batch, latents, frames)
        noise = rng.noise_sample(chunk.latents, flow)
        error = velocity_error(model, flow, chunk, 1, noise)
        return error.mean(), LossMetrics.of(error, noise, 1)
