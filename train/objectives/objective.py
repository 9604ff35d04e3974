"""What an objective is for the training loop, validation and the memory plan; and the random numbers that it gets."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.layout import Layout
from model.loss import NoiseSample
from model.noise import seeded_generator


@dataclass(frozen=True)
class LossMetrics:
    """The velocity errors of the latents that an objective predicts, detached."""

    loss: Tensor  # (b m) velocity error
    sigma: Tensor  # (b m)
    first: int  # index in the sequence of the first of the m
    sequence: torch.Size  # (b c f h w) of the latents that the model was given

    @classmethod
    def of(cls, error: Tensor, noise: NoiseSample, known: int) -> Self:
        """Of velocity errors (b f). The first `known` latents are given: they may count for the gradient, but not for
        the metrics."""
        sigma = noise.sigma if noise.sigma.ndim == 2 else noise.sigma[:, None].expand_as(error)
        b, c, f, h, w = noise.noise.shape
        sequence = torch.Size((b, c, 2 * f if noise.past else f, h, w))
        return cls(error[:, known:].detach(), sigma[:, known:], known, sequence)


Loss = tuple[Tensor, LossMetrics]


@dataclass(frozen=True)
class SampleRng:
    """One generator per sample of this rank's batch, and one that all ranks and micro-steps of a step share.

    A sample's noise depends on its global index alone, so a run gives the same losses on another number of ranks.
    """

    samples: tuple[torch.Generator, ...]
    shared: torch.Generator

    def noise(self, like: Tensor) -> Tensor:
        """Gaussian noise of the shape of `like` (b ...), float32 on its device."""
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in self.samples]
        return torch.stack(noise).to(like.device)

    def noise_sample(self, latents: Tensor, flow: FlowMatch) -> NoiseSample:
        """A noise level per sample, uniform over the flow's training table, and noise for `latents` (b c f h w)."""
        sigmas = flow.schedule(flow.config.train_steps).sigmas
        index = [torch.randint(len(sigmas), (1,), generator=generator) for generator in self.samples]
        return NoiseSample(sigmas[torch.cat(index)].float().to(latents.device), self.noise(latents))


def rng_for_step(seed: int, step: int, first_sample: int, batch: int) -> SampleRng:
    """For the samples `first_sample` ... of the global order, in optimizer step `step`."""
    samples = tuple(seeded_generator(seed, 0, first_sample + i) for i in range(batch))
    return SampleRng(samples, seeded_generator(seed, 1, step))


class Objective(ABC):
    """A frozen dataclass whose fields are the settings of `objective:`."""

    layout: ClassVar[Layout] = "chunked"  # of the clips it trains on
    causal: ClassVar[bool] = False  # whether it trains models with a `causal` section
    known: ClassVar[int] = 1  # first latents of a held-out clip that the model is given
    latents: ClassVar[int | None] = None  # of a held-out clip that are used, from its start; None: all
    copies: ClassVar[int] = 1  # of a clip in the sequence that the model is given

    @property
    def loss_group(self) -> int:
        """Latents that share a noise level, and so one `loss/block_i`; model.causal.block of a causal model."""
        return 1

    @abstractmethod
    def loss(self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng) -> Loss:
        """The loss of a batch and its metrics; `progress` in [0, 1] is the share of training done."""

    def heldout_noise(self, latents: Tensor, flow: FlowMatch, rng: SampleRng) -> NoiseSample:
        """The noise for held-out `latents` (b c f h w)."""
        return rng.noise_sample(latents, flow)
