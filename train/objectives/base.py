"""Image to one chunk: 9 frames = 3 latents, one noise level per sample, the first frame given."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.layout import CHUNK_LATENTS
from model.loss import NoiseSample, velocity_error
from sampling.metrics import cut_chunk
from train.objectives.draws import Draws


@dataclass(frozen=True)
class Figures:
    """What the loss was made of, detached: the latent frames that the objective is after."""

    loss: Tensor  # (b m) velocity error
    sigma: Tensor  # (b m)
    first: int  # place of the first of the m in the sequence
    sequence: torch.Size  # (b c f h w) of the latents that the model was given


def figures_after(known: int, error: Tensor, draw: NoiseSample) -> Figures:
    """Figures of velocity errors (b f). The first `known` latents are given, and no achievement: they may count for the
    gradient, but not for the figures."""
    sigma = draw.sigma if draw.sigma.ndim == 2 else draw.sigma[:, None].expand_as(error)
    return Figures(error[:, known:].detach(), sigma[:, known:], known, draw.noise.shape)


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
        return error.mean(), figures_after(1, error, draw)
