"""FSDP2: torch's own `fully_shard`. Accelerate's plugin does nothing on a CPU, without a word, so it is not asked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.action_dit import ActionDiT
from train.config import TrainConfig
from train.engine import Engine
from train.state import Fragment, local_part


def shard(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Every block by itself, and the rest: float32 weights cut along their first axis over all ranks, on `device`.

    A model on the meta device gets memory for this rank's part alone, without numbers.
    """
    assert isinstance(model, ActionDiT)
    if not (meta := next(model.parameters()).is_meta):
        model.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # The model casts its inputs itself: times and angles stay float32.
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = bf16 if config.engine.precision == "bf16" else MixedPrecisionPolicy(cast_forward_inputs=False)
    offload = OffloadPolicy() if config.engine.offload == "nothing" else CPUOffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    if meta:
        model.to_empty(device="cpu" if config.engine.offload == "all" else device)
    return model


class Fsdp2Engine(Engine):
    """Gradients are averaged and applied at the last micro-step, all by torch."""

    all_write_state = True
    micro_steps = 0

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def adam(self) -> torch.optim.Optimizer:
        return self.optimizer

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        self.micro_steps += 1
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(self.steps_now)
        yield

    @property
    def steps_now(self) -> bool:
        """Whether this micro-step is the last of its step."""
        return self.micro_steps % self.config.accumulation == 0

    def backward(self, loss: Tensor, apply: bool = True) -> bool:
        (loss / self.config.accumulation).backward()
        if not self.steps_now:
            return True
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        return self._step(float(norm.full_tensor() if isinstance(norm, DTensor) else norm), apply)

    def fragments(self) -> list[Fragment]:
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # a pass without a backward one, as in validation, leaves the outermost weights whole
        parts = []
        for name, p in self.model.named_parameters():
            assert isinstance(p, DTensor)
            _, first = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            start = first[0] * p.shape[1:].numel()
            parts.append(Fragment(name, start, local_part(p.data).view(-1), p, 0))
        return parts
