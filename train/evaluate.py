"""Held-out velocity loss during training: with the right actions, with those of other episodes, and with none."""

from dataclasses import replace

import torch

from data_pipeline.stream import Stream
from model.flow import FlowMatch
from model.layout import CHUNK_LATENTS, Layout
from model.loss import velocity_loss
from model.patch_codec import TEMPORAL
from sampling.metrics import action_variants, first_latents
from train.config import TrainConfig
from train.engine import Engine
from train.objectives import make_objective
from train.objectives.base import Base
from train.objectives.diffusion_forcing import DiffusionForcing
from train.objectives.draws import make_draws

VARIANTS = ("right", "shuffled", "none")


class Validation:
    """The same clips, noise levels and noise at every call, so that curves are comparable."""

    def __init__(self, config: TrainConfig, engine: Engine, flow: FlowMatch) -> None:
        assert config.validation.manifest
        self.engine, self.flow, self.batch = engine, flow, config.batch
        objective = make_objective(config.objective)
        self.forcing = replace(objective, context_share=0.0) if isinstance(objective, DiffusionForcing) else None
        self.known = 1 if isinstance(objective, Base | DiffusionForcing) else CHUNK_LATENTS
        self.layout: Layout = "continuous" if self.forcing else "chunked"
        self.stream = Stream(config.validation.manifest, config.batch, seed=0, workers=0)  # every rank sees all of it
        self.rounds = max(1, config.validation.clips // (config.batch * engine.accelerator.num_processes))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`heldout/right`, `/shuffled`, `/none`: mean squared velocity error of the latents to be made up."""
        sums = torch.zeros(2, len(VARIANTS))
        accelerator = self.engine.accelerator
        for done in range(self.rounds):
            place = done * accelerator.num_processes + accelerator.process_index
            batch = self.stream.batch_at(place).to(accelerator.device)
            chunk = first_latents(batch, CHUNK_LATENTS, self.layout, TEMPORAL)
            clips = chunk if self.known == 1 and not self.forcing else batch
            assert clips is not None
            draws = make_draws(0, place, place * self.batch, self.batch)
            if self.forcing:
                draw = self.forcing.draw(clips.latents, self.flow, draws)
            else:
                draw = draws.draw(clips.latents, self.flow)
            for name, variant in action_variants(clips).items():
                loss = velocity_loss(self.engine.model, self.flow, variant, self.known, draw, self.layout)
                sums[:, VARIANTS.index(name)] += torch.tensor([loss.sum().item(), len(loss)])
        sums = self.engine.sum_over_ranks(sums)
        return {f"heldout/{name}": (sums[0, i] / sums[1, i]).item() for i, name in enumerate(VARIANTS) if sums[1, i]}
