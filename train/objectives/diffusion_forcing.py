"""Continuous clips, block-causal: every block of latents at a noise level of its own, all of them trained at once."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from configs import within
from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.loss import NoiseSample, velocity_error
from train.objectives.objective import Loss, LossMetrics, Objective, SampleRng


@dataclass(frozen=True)
class DiffusionForcing(Objective):
    """Velocity loss under upstream's bell-shaped weight, one noise level per block (arXiv 2407.01392, 2506.08009).

    The model's own `causal` section says who sees whom; the first frame of a clip is given as its conditioning.
    """

    block: int = within(1, 1024, 3)  # latent frames that share a noise level: the model's causal.block
    # Levels drawn for every block alone leave a past that is nearly clean, as it is in a rollout, almost unseen: the
    # shift puts 2 % of the levels below 0.1. In this share of clips a random number of first blocks is that past.
    context_share: float = within(0, 1, 0.0)
    context_noise: float = within(0, 1, 0.0)  # largest noise level of such a past, drawn per clip; the model gets it

    layout = "continuous"
    causal = True

    @property
    def loss_group(self) -> int:
        return self.block

    def loss(self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng) -> Loss:
        noise = self.noise_sample(batch.latents, flow, rng)
        error = velocity_error(model, flow, batch, 1, noise, "continuous")
        schedule = flow.schedule(flow.config.train_steps)
        weight = schedule.training_weight(flow.config.train_steps * noise.sigma)  # most for middle levels
        return (error * weight).mean(), LossMetrics.of(error, noise, 1)

    def heldout_noise(self, latents: Tensor, flow: FlowMatch, rng: SampleRng) -> NoiseSample:
        return replace(self, context_share=0.0).noise_sample(latents, flow, rng)

    def noise_sample(self, latents: Tensor, flow: FlowMatch, rng: SampleRng) -> NoiseSample:
        """Noise levels (b f), equal within a block, and noise for `latents` (b c f h w)."""
        sigmas = flow.schedule(flow.config.train_steps).sigmas.float()
        blocks = latents.shape[2] // self.block
        levels = torch.stack([self._levels(blocks, sigmas, generator) for generator in rng.samples])
        return NoiseSample(levels.repeat_interleave(self.block, dim=1).to(latents.device), rng.noise(latents))

    def _levels(self, blocks: int, sigmas: Tensor, generator: torch.Generator) -> Tensor:
        """The noise level of each block of one clip."""
        levels = sigmas[torch.randint(len(sigmas), (blocks,), generator=generator)]
        chance, level = torch.rand(2, generator=generator)
        past = torch.randint(blocks, (1,), generator=generator)
        known = (torch.arange(blocks) < past) & (chance < self.context_share)
        return torch.where(known, self.context_noise * level, levels)
