"""Image to one chunk: 9 frames = 3 latents, one noise level per sample, the first frame given."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.types import CHUNK_LATENTS, Batch
from model.flow import FlowMatch
from sampling.scores import cut_chunk, velocity_error
from train.objectives.draws import Draws


@dataclass(frozen=True)
class Figures:
    """Per sample, detached: what the loss was made of."""

    loss: Tensor  # (b) velocity error of the latents the objective is after
    sigma: Tensor  # (b)


@dataclass(frozen=True)
class Base:
    """Velocity loss of a 3-latent chunk that follows its own first frame."""

    def loss(
        self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Figures]:
        """The mean squared velocity error and its parts; `progress` in [0, 1] is unused here."""
        # Each chunk of a clip serves in turn; with image tokens the first alone, whose first frame they show.
        chunks = 1 if batch.visual is not None else batch.latents.shape[2] // CHUNK_LATENTS
        chunk = cut_chunk(batch, int(torch.randint(chunks, (1,), generator=draws.shared)))
        draw = draws.draw(chunk.latents, flow)
        error = velocity_error(model, flow, chunk, 1, draw)
        # The given latent is no achievement: it counts for the gradient, not for the figure.
        return error.mean(), Figures(error[:, 1:].mean(dim=1).detach(), draw.sigma)
