"""The random numbers of a step: a function of the seed and the sample, never of the rank or the past."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.flow import FlowMatch
from model.loss import NoiseSample
from model.noise import seeded_generator


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

    def uniform(self) -> Tensor:
        """Numbers (b) in [0, 1)."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self.samples])


def rng_for_step(seed: int, step: int, first_sample: int, batch: int) -> SampleRng:
    """For the samples `first_sample` ... of the global order, in optimizer step `step`."""
    samples = tuple(seeded_generator(seed, 0, first_sample + i) for i in range(batch))
    return SampleRng(samples, seeded_generator(seed, 1, step))
