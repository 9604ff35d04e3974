"""Continuous clips, block-causal: every block from a past that is nearly clean, as in a rollout, all in one pass."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from configs import within
from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.loss import NoiseSample, velocity_error
from train.objectives.objective import Loss, LossMetrics, Objective, SampleRng


@dataclass(frozen=True)
class TeacherForcing(Objective):
    """The squared velocity error of every block, which sees the clip's own past instead of noisy ones.

    The model gets the clip twice: a past whose noise level it is told, one per clip, and the blocks to make.
    """

    block: int = within(1, 1024, 3)  # latent frames that are made together: the model's causal.block
    # Largest noise level of the past. It is context_noise u^2 with u uniform: mostly little, as in a rollout.
    context_noise: float = within(0, 1, 0.3)
    levels: Literal["uniform", "logit_normal"] = "logit_normal"  # uniform: over the flow's own table, with its shift
    level_mean: float = within(-10, 10, 0.3)  # of a logit-normal level's logit; above 0 there is more noise
    level_std: float = within(1e-3, 10, 1.0)

    layout = "continuous"
    causal = True
    copies = 2

    @property
    def loss_group(self) -> int:
        return self.block

    def loss(self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng) -> Loss:
        noise = self.heldout_noise(batch.latents, flow, rng)
        error = velocity_error(model, flow, batch, 1, noise, "continuous")
        return error[:, 1:].mean(), LossMetrics.of(error, noise, 1)

    def heldout_noise(self, latents: Tensor, flow: FlowMatch, rng: SampleRng) -> NoiseSample:
        """Levels (b f), equal within a block, and noise for `latents` (b c f h w); and those of their past."""
        f, sigmas = latents.shape[2], flow.schedule(flow.config.train_steps).sigmas.float()
        levels = torch.stack([self._levels(f // self.block, sigmas, generator) for generator in rng.samples])
        told = torch.cat([self.context_noise * torch.rand(1, generator=own).square() for own in rng.samples])
        past = NoiseSample(told[:, None].repeat(1, f).to(latents.device), rng.noise(latents))
        sigma = levels.repeat_interleave(self.block, dim=1).to(latents.device)
        return NoiseSample(sigma, rng.noise(latents), past)

    def _levels(self, blocks: int, sigmas: Tensor, generator: torch.Generator) -> Tensor:
        """The noise level of each block of one clip."""
        if self.levels == "uniform":
            return sigmas[torch.randint(len(sigmas), (blocks,), generator=generator)]
        return torch.sigmoid(self.level_mean + self.level_std * torch.randn(blocks, generator=generator))
