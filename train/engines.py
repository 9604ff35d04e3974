"""The registry of engines: a new one is a file and a line here. Starting one, and the weights that it starts from."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from configs import to_dict
from configs.errors import UserError
from model.action_dit import ActionDiT
from model.weights import bare_weights, load_into, open_weights, require_same_tensors
from train.config import TrainConfig
from train.engine import Engine, group_timeout
from train.fsdp2 import Fsdp2Engine
from train.memory import give_back
from train.zero import ZeroEngine

ENGINES: dict[str, type[Engine]] = {"ddp": Engine, "fsdp2": Fsdp2Engine, "deepspeed": ZeroEngine}
META = torch.device("meta")


def engine_of(config: TrainConfig) -> type[Engine]:
    """The engine that `config.engine` names. Raises UserError if there is none, or it lacks an option asked for."""
    name = config.engine.name
    if name not in ENGINES:
        raise UserError(f"engine.name={name}; there are: {', '.join(ENGINES)}")
    for option, allowed in ENGINES[name].options(config.engine).items():
        if (value := getattr(config.engine, option)) not in allowed:
            raise UserError(
                f"engine.{option}={value} is not for engine.name={name} engine.stage={config.engine.stage}: use "
                f"{' or '.join(allowed)}, engine.name=fsdp2, or engine.name=deepspeed engine.stage=3"
            )
    return ENGINES[name]


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of `config.engine`. Raises UserError if the process was not launched for it."""
    engine, world = engine_of(config), int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu, deepspeed = not torch.cuda.is_available(), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed != (engine is ZeroEngine):
        file = "cpu_plain" if deepspeed else "cpu_zero2"
        raise UserError(
            f"engine.name={config.engine.name} needs accelerate launch --config_file launch/accelerate/{file}.yaml "
            "-m train ...; for one plain process say engine.name=ddp"
        )
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing deepspeed warns on stdout
    backend = engine.backend(config, "cpu" if on_cpu else "cuda")
    groups = InitProcessGroupKwargs(backend=backend, timeout=group_timeout(config))
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulation,
        kwargs_handlers=[groups] if world > 1 or deepspeed else None,
        **engine.accelerate_args(config),
    )
    assert accelerator.num_processes == world, "Accelerate did not take all processes"
    return accelerator


def print_engine(config: TrainConfig) -> None:
    """Print what Accelerate, and through it DeepSpeed, is told: file.yaml ... key=value ..."""
    settings = {"engine": to_dict(config.engine), "accelerate": engine_of(config).accelerate_args(config)}
    print(json.dumps(settings, indent=2, default=lambda plugin: plugin.deepspeed_config))


def build_engine(accelerator: Accelerator, config: TrainConfig, init: str | None) -> Engine:
    """The engine of `config` with random weights by its seed, or with those of the file at the url `init`.

    With engine.build=sharded the model has no memory until it is sharded, and then takes its numbers part by part.
    """
    sharded, generator = config.engine.build == "sharded", torch.Generator().manual_seed(config.seed)
    with META if sharded else nullcontext():
        model = ActionDiT(config.model, None if sharded else generator)
    if init and not sharded:
        load_into(model, open_weights(init))
    model.compile_blocks(config.engine.compile)
    engine = engine_of(config).prepare(accelerator, model, config)
    if not sharded:
        return engine
    with META:
        template = ActionDiT(config.model)
    if init:
        weights = bare_weights(open_weights(init))
        require_same_tensors(template.state_dict(), weights.specs, f"{weights.where} holds another model")
        for name in weights:
            engine.load_shard({name: weights[name]})
    else:
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
