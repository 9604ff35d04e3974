"""The registry of engines: a new one is a file and a line here."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from configs.errors import UserError
from train.config import TrainConfig
from train.engine import Engine, set_timeouts
from train.fsdp2 import Fsdp2Engine
from train.zero import ZeroEngine

ENGINES: dict[str, type[Engine]] = {"ddp": Engine, "fsdp2": Fsdp2Engine, "deepspeed": ZeroEngine}


def engine_of(config: TrainConfig) -> type[Engine]:
    """The engine that `config.engine` names. Raises UserError for one that is not there or cannot do what it asks."""
    name = config.engine.name
    if name not in ENGINES:
        raise UserError(f"engine.name={name}; there are: {', '.join(ENGINES)}")
    for option, allowed in ENGINES[name].options(config.engine).items():
        if (given := getattr(config.engine, option)) not in allowed:
            raise UserError(
                f"engine.{option}={given} is not for engine.name={name} engine.stage={config.engine.stage}: use "
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
    groups = InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=config.engine.timeout_s))
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,  # with it, Accelerate drops DeepSpeed without a word
        deepspeed_plugin=engine.plugin(config),
        gradient_accumulation_steps=config.accumulation,
        mixed_precision="bf16" if engine.accelerate_casts and config.engine.precision == "bf16" else "no",
        kwargs_handlers=[groups] if world > 1 or deepspeed else None,
    )
    set_timeouts(config)
    if accelerator.num_processes != world:
        raise RuntimeError(f"asked for {world} processes, Accelerate gave {accelerator.num_processes}")
    return accelerator
