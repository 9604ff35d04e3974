"""Builds an engine part by part, at random and from a file, and compares this rank's share with a model built whole."""

import sys
from pathlib import Path

import torch

from configs import load_config
from model.action_dit import ActionDiT
from model.weights import save_weights
from train.config import TrainConfig
from train.engine import Engine
from train.engines import build_engine, start_accelerator


def starts_as(engine: Engine, whole: ActionDiT) -> int:
    """How many numbers all ranks compared."""
    wanted, compared = dict(whole.named_parameters()), 0
    for shard in engine.shards():
        span = wanted[shard.name].detach().flatten()[shard.start : shard.start + len(shard.weight)]
        assert torch.equal(shard.weight, span), shard.name
        compared += len(span)
    for name, buffer in engine.buffers():
        assert torch.equal(buffer.float(), whole.get_buffer(name)), name
    return int(engine.sum_over_ranks(torch.tensor(compared)))


if __name__ == "__main__":
    config = load_config(TrainConfig, sys.argv[1:])
    accelerator = start_accelerator(config)
    drawn, other = (ActionDiT(config.model, torch.Generator().manual_seed(config.seed + i)) for i in range(2))
    counted = starts_as(build_engine(accelerator, config, None), drawn)
    path = Path(config.out) / f"rank_{accelerator.process_index}.safetensors"
    for buffer in other.buffers():
        buffer.fill_(0.5)
    save_weights(other.state_dict(), path)
    starts_as(engine := build_engine(accelerator, config, str(path)), other)
    assert counted == sum(p.numel() for p in drawn.parameters())
    if accelerator.is_main_process:
        sys.stdout.write("equal\n")
    engine.shutdown()
