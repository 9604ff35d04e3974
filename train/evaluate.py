"""Held-out velocity loss during training: with the right actions, and with those of another clip."""

from dataclasses import replace

import torch

from data_pipeline.stream import Stream
from data_pipeline.types import Batch
from model.flow import FlowMatch
from train.config import TrainConfig
from train.engine import Engine
from train.objectives.base import CHUNK_LATENTS, velocity_error
from train.objectives.draws import make_draws


class Validation:
    """The same clips, noise levels and noise at every call, so that curves are comparable."""

    def __init__(self, config: TrainConfig, engine: Engine, flow: FlowMatch) -> None:
        assert config.validation.manifest
        self.engine, self.flow, self.batch = engine, flow, config.batch
        self.known = 1 if config.objective["name"] == "base" else CHUNK_LATENTS
        self.stream = Stream(config.validation.manifest, config.batch, seed=0, workers=0)  # every rank sees all of it
        self.rounds = max(1, config.validation.clips // (config.batch * engine.accelerator.num_processes))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`heldout/right` and `heldout/shuffled`: mean squared velocity error of the latents to be made up."""
        sums = torch.zeros(3)
        accelerator = self.engine.accelerator
        for done in range(self.rounds):
            place = done * accelerator.num_processes + accelerator.process_index
            batch = self.stream.batch_at(place).to(accelerator.device)
            swapped = replace(batch, keyboard=batch.keyboard.roll(1, 0), mouse=batch.mouse.roll(1, 0))
            for i, one in enumerate((batch, swapped)):
                sums[i] += self._error(one, place)
            sums[2] += self.batch
        sums = self.engine.sum_over_ranks(sums)
        return {"heldout/right": (sums[0] / sums[2]).item(), "heldout/shuffled": (sums[1] / sums[2]).item()}

    def _error(self, batch: Batch, place: int) -> torch.Tensor:
        latents = 3 if self.known == 1 else batch.latents.shape[2]
        frames = 9 if self.known == 1 else batch.keyboard.shape[1]
        draws = make_draws(0, place, place * self.batch, self.batch)
        actions = (batch.keyboard[:, :frames], batch.mouse[:, :frames])
        error, _ = velocity_error(self.engine.model, self.flow, batch.latents[:, :, :latents], actions, self.known, draws)
        return error[:, self.known :].mean(dim=1).sum().cpu()
