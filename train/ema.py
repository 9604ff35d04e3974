"""Exponential moving average of the weights, sharded as the optimizer is."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from train.engine import Engine
from train.state import SavedState


class Ema:
    """The average of each rank's own float32 weights: nothing is exchanged, nothing is rounded to bf16."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.averages: dict[str, Tensor] = {shard.name: shard.weight.clone() for shard in engine.shards()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (from 0); early steps average over fewer, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        shards = self.engine.shards()
        averages = [self.averages[shard.name] for shard in shards]
        torch._foreach_lerp_(averages, [shard.weight for shard in shards], 1 - decay)

    @torch.no_grad()
    def whole(self, specs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and float32 tensors on the CPU: the averages of all ranks put together, and the model's buffers, in the
        order of `specs`, the model's state on the meta device. All ranks must go through it."""
        own = {shard.name: shard for shard in self.engine.shards()} if self.engine.writes_state else {}
        buffers = dict(self.engine.buffers())
        for name, spec in specs.items():
            if name in buffers:
                yield name, buffers[name].float().cpu()
                continue
            flat = torch.zeros(spec.numel())
            if name in own:
                start = own[name].start
                flat[start : start + len(own[name].weight)] = self.averages[name]
            yield name, self.engine.sum_over_ranks(flat).reshape(spec.shape)

    def restore(self, saved: SavedState) -> None:
        """The averages of a saved run, in the parts that this rank has now."""
        for shard in self.engine.shards():
            self.averages[shard.name].copy_(saved.read("ema", shard.name, shard.start, len(shard.weight)))
