"""An engine puts a model on processes, steps it, and says which part of the weights each rank owns."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.errors import UserError
from configs.untrusted import parse_json
from train.config import EngineConfig, TrainConfig
from train.optim import MuonAdamW, make_optimizer
from train.state import ParamShard, SavedState

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16"}  # Accelerate's names
OBJECT_BYTES = 1 << 20  # that a rank may send with `gather_objects`


@dataclass
class Engine:
    """A prepared model with its optimizer; the same calls whatever shards them. This one shards nothing: one process,
    or several under DDP. Others stand in a file of their own and in `train/engines.py`."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer  # torch's own, inside the engine's wrappers
    config: TrainConfig
    grad_norm: float = 0.0  # of the newest step that was applied, before clipping

    all_write_state = False  # whether every rank owns a part of the state; else rank 0 writes all of it

    @staticmethod
    def options(config: EngineConfig) -> dict[str, tuple[str, ...]]:
        """By setting, the values that this engine has, where it does not have all of them."""
        return {"offload": ("nothing",), "build": ("whole",)}

    @classmethod
    def accelerate_args(cls, config: TrainConfig) -> dict[str, Any]:
        """Keyword arguments of Accelerator."""
        return {"cpu": not torch.cuda.is_available(), "mixed_precision": MIXED_PRECISION[config.engine.precision]}

    @staticmethod
    def state_bytes(config: TrainConfig, parameters: int, moments: int, ranks: int, on_cpu: bool) -> dict[str, int]:
        """The memory of a rank for a model of so many `parameters`, with `moments` numbers of the optimizer's state,
        besides activations and averages. On a CPU memory counts once it is written to."""
        exchanged = 4 * parameters if ranks > 1 else 0  # DDP's buckets
        weights = {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer's states": 4 * moments}
        return {**weights, "exchanged": exchanged}

    @classmethod
    def backend(cls, config: TrainConfig, device: str) -> str:
        """Of the process group, on `device` cpu or cuda."""
        return "gloo" if device == "cpu" else "nccl"

    @classmethod
    def prepare(cls, accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> Self:
        """The engine with `model`. A model on the meta device gets memory for this rank's part alone, without numbers:
        `load_shard` must follow."""
        prepared = accelerator.prepare(model)
        return cls(accelerator, prepared, make_optimizer(model, config.optim), config)

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, MuonAdamW):
            cut = self.all_write_state and self.accelerator.num_processes > 1
            dtype = torch.bfloat16 if self.config.engine.precision == "bf16" else torch.float32
            compute = torch.empty(0, dtype=dtype, device=self.accelerator.device)
            self.optimizer.own(self.shards(), self.module, compute, cut)

    @property
    def module(self) -> nn.Module:
        """The model without the engine's wrapper."""
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        return unwrapped

    def accumulate(self) -> AbstractContextManager[Any]:
        """Surrounds one micro-step; gradients are exchanged and applied at the last of them."""
        return self.accelerator.accumulate(self.model)

    def scale_learning_rates(self, factor: float) -> None:
        """Sets them to their peaks times `factor`, before the step's backward pass, inside which DeepSpeed steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]

    def backward(self, loss: Tensor, apply: bool = True) -> bool:
        """Adds the gradients of one micro-step; at the last they are clipped and applied, and `grad_norm` is set. If
        their norm is not finite, or without `apply`, the whole step is dropped, and False is returned."""
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return True
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if applied := apply and math.isfinite(norm):
            self.grad_norm = norm
            self.optimizer.step()
        self.optimizer.zero_grad()
        return applied

    def shards(self) -> list[ParamShard]:
        """The float32 weights that this rank optimises and writes into a checkpoint: here all, on every rank."""
        return [ParamShard(name, 0, p.data.view(-1), p, 0) for name, p in self.module.named_parameters()]

    @property
    def writes_state(self) -> bool:
        """Whether this rank's shards go into a checkpoint."""
        return self.all_write_state or self.accelerator.is_main_process

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The module's buffers that its weights files hold."""
        kept = self.module.state_dict().keys()
        return ((name, buffer) for name, buffer in self.module.named_buffers() if name in kept)

    def restore(self, saved: SavedState) -> None:
        """Weights, moments and buffers of a saved run. All ranks must call."""
        saved.restore(self.shards(), self.optimizer)
        for name, buffer in self.buffers():
            buffer.copy_(saved.read("weight", name, 0, buffer.numel()).reshape(buffer.shape))
        self.sync_compute_weights()

    @torch.no_grad()
    def load_shard(self, weights: Mapping[str, Tensor]) -> None:
        """Takes this rank's part of whole parameters and buffers; `sync_compute_weights` must follow the last."""
        shards = {shard.name: shard for shard in self.shards()}
        buffers = dict(self.buffers())
        for name, whole in weights.items():
            if name in buffers:
                buffers[name].copy_(whole)
            elif shard := shards.get(name):
                shard.weight.copy_(whole.flatten()[shard.start : shard.start + len(shard.weight)])

    def sync_compute_weights(self) -> None:
        """Updates the copies of the shards that the passes use, if there are any, after the shards have changed."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks; the same on each."""
        summed: Any = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return summed.cpu()

    def shutdown(self) -> None:
        """Ends the process groups; without it gloo's threads can crash the interpreter at exit."""
        self.accelerator.end_training()
        time.sleep(0.2)


def group_timeout(config: TrainConfig) -> timedelta:
    """Of process groups: longer than the watchdog's limit, whose message says more."""
    return timedelta(seconds=2 * config.engine.timeout_s)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, by rank: torch's all_gather_object, but with JSON, since unpickling what a peer sends
    may run any code. Tuples become lists. UserError on all ranks if one sends more than OBJECT_BYTES or no JSON."""
    if not dist.is_initialized():
        return [value]
    device = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else None
    sent = json.dumps(value).encode()
    length = torch.tensor(len(sent), device=device)
    dist.all_reduce(length, dist.ReduceOp.MAX)
    if length > OBJECT_BYTES:
        raise UserError(f"a rank sends the others {length} bytes, of {OBJECT_BYTES} at most")
    padded = torch.tensor(list(sent.ljust(int(length))), dtype=torch.uint8, device=device)  # JSON may end with spaces
    received = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(received, padded)
    return [parse_json(bytes(text.tolist()), f"what rank {rank} sends") for rank, text in enumerate(received)]
