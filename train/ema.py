"""Exponential moving average of the weights, sharded as the optimizer is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from train.engine import Engine


class Ema:
    """The average of each rank's own float32 master weights: nothing is exchanged, nothing is rounded to bf16."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.averages: list[Tensor] = [weights.clone() for weights in engine.master_weights()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (from 0); early steps average over fewer, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, weights in zip(self.averages, self.engine.master_weights(), strict=True):
            average.lerp_(weights, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Within the block the engine's master weights are the average, so that `full_weights` gathers it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weights in zip(self.averages, self.engine.master_weights(), strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    def save(self, path: Path) -> None:
        """This rank's share."""
        torch.save(self.averages, path)

    def load(self, path: Path) -> None:
        """What `save` wrote on the same rank of as many."""
        loaded = torch.load(path, weights_only=True)
        for average, saved in zip(self.averages, loaded, strict=True):
            average.copy_(saved)
