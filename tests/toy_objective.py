"""An objective in one file: the velocity error of a whole clip after its first frame."""

from dataclasses import dataclass

from torch import nn

from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.loss import velocity_error
from train.objectives.objective import Loss, LossMetrics, Objective, SampleRng


@dataclass(frozen=True)
class Toy(Objective):
    scale: float = 1.0

    def loss(self, model: nn.Module, flow: FlowMatch, batch: Batch, progress: float, rng: SampleRng) -> Loss:
        noise = rng.noise_sample(batch.latents, flow)
        error = velocity_error(model, flow, batch, self.known, noise)
        return self.scale * error.mean(), LossMetrics.of(error, noise, self.known)
