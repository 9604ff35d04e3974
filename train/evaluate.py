"""Held-out velocity loss during training: with the right actions, with those of other episodes, and with none."""

import torch

from data_pipeline.stream import Stream
from model.flow import FlowMatch
from model.loss import velocity_loss
from sampling.metrics import action_variants, first_latents
from train.config import TrainConfig
from train.engine import Engine
from train.objectives.objective import Objective, rng_for_step

VARIANTS = ("right", "shuffled", "none")


class Validation:
    """The same clips, noise levels and noise at every call, so that curves are comparable."""

    def __init__(self, config: TrainConfig, objective: Objective, engine: Engine, flow: FlowMatch) -> None:
        assert config.validation.manifest
        self.objective, self.engine, self.flow, self.batch = objective, engine, flow, config.batch
        self.stream = Stream(config.validation.manifest, config.batch, seed=0, workers=0)  # every rank sees all of it
        self.rounds = max(1, config.validation.clips // (config.batch * engine.accelerator.num_processes))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`heldout/right`, `/shuffled`, `/none`: mean squared velocity error of the latents to be made up."""
        sums = torch.zeros(2, len(VARIANTS))
        objective, accelerator = self.objective, self.engine.accelerator
        temporal = self.stream.shards.manifest.temporal
        for done in range(self.rounds):
            index = done * accelerator.num_processes + accelerator.process_index
            batch = self.stream.batch_at(index).to(accelerator.device)
            clips = first_latents(batch, objective.latents or batch.latents.shape[2], objective.layout, temporal)
            assert clips is not None
            rng = rng_for_step(0, index, index * self.batch, self.batch)
            noise = objective.heldout_noise(clips.latents, self.flow, rng)
            for name, variant in action_variants(clips).items():
                loss = velocity_loss(self.engine.model, self.flow, variant, objective.known, noise, objective.layout)
                sums[:, VARIANTS.index(name)] += torch.tensor([loss.sum().item(), len(loss)])
        sums = self.engine.sum_over_ranks(sums)
        return {f"heldout/{name}": (sums[0, i] / sums[1, i]).item() for i, name in enumerate(VARIANTS) if sums[1, i]}
