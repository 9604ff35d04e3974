"""A run's engine with the weights that it starts from, whether the model is built whole or part by part."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from model.action_dit import ActionDiT
from model.weights import bare_weights, load_into, open_weights, require_same_tensors
from train.config import TrainConfig
from train.engine import Engine
from train.engines import engine_of
from train.memory import give_back

META = torch.device("meta")


def print_engine(config: TrainConfig) -> None:
    """Print the settings of a run's engine without starting it: the same arguments as for training"""
    print(json.dumps({config.engine.name: engine_of(config).settings(config)}, indent=2))


def build_engine(accelerator: Accelerator, config: TrainConfig, init: str | None) -> Engine:
    """The engine of `config` with random weights by its seed, or with those of the file at the url `init`.

    With engine.build=sharded the model has no memory until it is sharded, and then takes its numbers part by part.
    """
    sharded, generator = config.engine.build == "sharded", torch.Generator().manual_seed(config.seed)
    with META if sharded else nullcontext():
        model = ActionDiT(config.model, None if sharded else generator)
    specs = {name: tensor.to(META) for name, tensor in model.state_dict().items()}
    if init and not sharded:
        load_into(model, open_weights(init))
    model.compile_blocks(config.engine.compile)
    engine = engine_of(config).prepare(accelerator, model, config)
    if not sharded:
        return engine
    if init:
        weights = bare_weights(open_weights(init))
        require_same_tensors(specs, weights.specs, f"{weights.where} holds another model")
        for name in weights:
            engine.load_shard({name: weights[name]})
    else:
        with META:
            template = ActionDiT(config.model)
        template.init_weights(generator, lambda part: _drawn_for(engine, *part))
    engine.sync_compute_weights()
    return engine


@contextmanager
def _drawn_for(engine: Engine, name: str, part: nn.Module) -> Iterator[None]:
    """Memory on the CPU for a part of the model while its numbers are drawn; the engine takes this rank's share."""
    part.to_empty(device="cpu")
    yield
    engine.load_shard({f"{name}.{key}": tensor for key, tensor in part.state_dict().items()})
    part.to(META)
    give_back()
