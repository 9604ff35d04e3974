"""FSDP2: torch's own `fully_shard`. Accelerate's plugin for it silently does nothing on a CPU."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from configs.errors import UserError
from model.action_dit import ActionDiT
from train.config import EngineConfig, TrainConfig
from train.engine import Engine
from train.optim import make_optimizer
from train.state import ParamShard, local_part


class Fsdp2Engine(Engine):
    """Float32 weights sharded along their first axis over all ranks: each block by itself, then the rest."""

    all_write_state = True

    @staticmethod
    def options(config: EngineConfig) -> dict[str, tuple[str, ...]]:
        return {"offload": ("nothing", "all")}

    @staticmethod
    def state_bytes(config: TrainConfig, parameters: int, moments: int, ranks: int, on_cpu: bool) -> dict[str, int]:
        share = parameters // ranks
        gathered = 4 * 4 * parameters // config.model.num_layers  # two blocks and their gradients
        states = {"weights": 4 * share, "gradients": 4 * share, "optimizer's states": 4 * moments // ranks}
        return {**states, "exchanged": gathered}

    @classmethod
    def accelerate_args(cls, config: TrainConfig) -> dict[str, Any]:
        return {**super().accelerate_args(config), "mixed_precision": "no"}  # FSDP2 casts by itself

    @classmethod
    def backend(cls, config: TrainConfig, device: str) -> str:
        # The gradients of an offloaded model lie on the CPU, and their norm is summed there.
        both = device == "cuda" and config.engine.offload == "all"
        return "cuda:nccl,cpu:gloo" if both else super().backend(config, device)

    @classmethod
    def prepare(cls, accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> Self:
        assert isinstance(model, ActionDiT)
        device, offloaded = accelerator.device, config.engine.offload == "all"
        if offloaded and device.type == "cpu":
            raise UserError("engine.offload=all of fsdp2 needs an accelerator; on a CPU leave it out")
        if not (meta := next(model.parameters()).is_meta):
            model.to(device)
        # The model casts its inputs itself: times and angles stay float32.
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        if not dist.is_initialized():  # one process by itself
            backend = cls.backend(config, device.type)
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        offload = CPUOffloadPolicy() if offloaded else OffloadPolicy()
        for module in (*model.blocks, model):
            fully_shard(module, mp_policy=policy, offload_policy=offload)
        if meta:
            model.to_empty(device="cpu" if offloaded else device)
        return cls(accelerator, model, make_optimizer(model, config.optim), config)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        with super().accumulate():
            self.model.set_requires_gradient_sync(self.accelerator.sync_gradients)
            yield

    def shards(self) -> list[ParamShard]:
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # a forward pass alone, as in validation, leaves the outermost weights whole
        shards = []
        for name, p in self.model.named_parameters():
            rows = math.ceil(len(p) / self.accelerator.num_processes)  # per rank; the last ranks may have fewer
            start = min(rows * self.accelerator.process_index, len(p)) * p.shape[1:].numel()
            shards.append(ParamShard(name, start, local_part(p.data).view(-1), p, 0))
        return shards
