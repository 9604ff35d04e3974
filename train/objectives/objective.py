"""What the training loop, validation and the memory plan ask of an objective."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.layout import Layout
from model.loss import NoiseSample
from train.objectives.sample_rng import SampleRng


@dataclass(frozen=True)
class LossMetrics:
    """What the loss was made of, detached: the latent frames that the objective is after."""

    loss: Tensor  # (b m) velocity error
    sigma: Tensor  # (b m)
    first: int  # place of the first of the m in the sequence
    sequence: torch.Size  # (b c f h w) of the latents that the model was given

    @classmethod
    def of(cls, error: Tensor, noise: NoiseSample, known: int) -> Self:
        """Of velocity errors (b f). The first `known` latents are given, and no achievement: they may count for the
        gradient, but not for the metrics."""
        sigma = noise.sigma if noise.sigma.ndim == 2 else noise.sigma[:, None].expand_as(error)
        return cls(error[:, known:].detach(), sigma[:, known:], known, noise.noise.shape)


class Objective(ABC):
    """A frozen dataclass whose fields are the settings of `objective:`; what it declares differs from this."""

    layout: ClassVar[Layout] = "chunked"  # of the clips it trains on
    causal: ClassVar[bool] = False  # whether it trains models with a `causal` section
    known: ClassVar[int] = 1  # first latents of a held-out clip that the model is given
    latents: ClassVar[int | None] = None  # first latents of a clip that it is about; None: all

    @property
    def loss_group(self) -> int:
        """Latents that share a noise level, and so one `loss/block_i`; model.causal.block of a causal model."""
        return 1

    @abstractmethod
    def loss(
        self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng
    ) -> tuple[Tensor, LossMetrics]:
        """The loss of a batch, and what it was made of; `progress` in [0, 1] is the share of training done."""

    def heldout_noise(self, latents: Tensor, flow: FlowMatch, rng: SampleRng) -> NoiseSample:
        """The noise levels and the noise that held-out `latents` (b c f h w) are measured with."""
        return rng.noise_sample(latents, flow)
