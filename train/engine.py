"""What an engine is: it puts a model on processes, steps it, and says which part of the weights each rank owns."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from configs.errors import UserError
from configs.untrusted import parse_json
from train.config import EngineConfig, TrainConfig
from train.optim import make_optimizer
from train.state import ParamShard, SavedState

OBJECT_BYTES = 1 << 20  # that a rank may send with `gather_objects`


@dataclass
class Engine:
    """A prepared model with its optimizer; the same calls whatever shards them. This one shards nothing: one process,
    or several under DDP. Others stand in a file of their own and in `train/engines.py`."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    config: TrainConfig
    grad_norm: float = 0.0  # of the newest step that was applied, before clipping

    all_write_state = False  # whether every rank owns a part of the state; else rank 0 writes all of it
    accelerate_casts = True  # whether Accelerate, not the engine, runs the passes in engine.precision

    @staticmethod
    def options(config: EngineConfig) -> dict[str, tuple[str, ...]]:
        """Which settings of `config` this engine has, where it has not all of them."""
        return {"offload": ("nothing",), "build": ("whole",)}

    @staticmethod
    def plugin(config: TrainConfig) -> Any:
        """The plugin of Accelerate that this engine is, if it is one."""
        return None

    @staticmethod
    def state_bytes(config: TrainConfig, parameters: int, ranks: int, on_cpu: bool) -> dict[str, int]:
        """What a rank holds for a model of so many `parameters` besides activations and averages. On a CPU memory
        counts when it is written to."""
        exchanged = 4 * parameters if ranks > 1 else 0  # DDP's buckets
        weights = {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer's states": 8 * parameters}
        return {**weights, "exchanged": exchanged}

    @classmethod
    def settings(cls, config: TrainConfig) -> dict[str, Any]:
        """What `python -m train engine` prints."""
        return {
            "precision": config.engine.precision,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": config.optim.clip_norm,
        }

    @classmethod
    def backend(cls, config: TrainConfig, device: str) -> str:
        """Of the process group, on `device` cpu or cuda."""
        return "gloo" if device == "cpu" else "nccl"

    @classmethod
    def prepare(cls, accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> "Engine":
        """The engine with `model`. A model on the meta device gets memory for this rank's part alone, without numbers:
        `load_shard` must follow."""
        if accelerator.num_processes == 1:
            model = model.to(accelerator.device)
        model, optimizer = accelerator.prepare(model, make_optimizer(model, config.optim))
        return cls(accelerator, model, optimizer, config)

    @property
    def module(self) -> nn.Module:
        """The model without the engine's wrapper."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        assert isinstance(unwrapped, nn.Module)
        return unwrapped

    @property
    def adam(self) -> torch.optim.Optimizer:
        """torch's own optimizer inside the wrappers."""
        return self.optimizer.optimizer

    def accumulate(self) -> AbstractContextManager[Any]:
        """Surrounds one micro-step; gradients are exchanged and applied at the last of them."""
        return self.accelerator.accumulate(self.model)

    def set_learning_rate(self, rate: float) -> None:
        """Before the backward pass of the step it is for: DeepSpeed steps inside of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor, apply: bool = True) -> bool:
        """Adds the gradients of one micro-step; at the last they are clipped and applied, and `grad_norm` is set. If
        their norm is not finite, or without `apply`, the whole step is dropped. Whether they were kept."""
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return True
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        return self._step(float(norm) if norm is not None else 0.0, apply)

    def _step(self, norm: float, apply: bool) -> bool:
        """Applies the clipped gradients, whose norm was `norm`, or drops them."""
        if applied := apply and math.isfinite(norm):
            self.grad_norm = norm
            self.optimizer.step()
        self.optimizer.zero_grad()
        return applied

    def shards(self) -> list[ParamShard]:
        """What this rank optimises, in float32, and writes into a checkpoint: here the whole, on every rank."""
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [ParamShard(name, 0, p.data.view(-1), p, 0) for name, p in trained]

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
        saved.restore(self.shards(), self.adam)
        for name, buffer in self.buffers():
            buffer.copy_(saved.read("weight", name, 0, buffer.numel()).reshape(buffer.shape))
        self.sync_compute_weights()

    @torch.no_grad()
    def load_shard(self, weights: Mapping[str, Tensor]) -> None:
        """Takes this rank's part of whole parameters and buffers; `sync_compute_weights` must follow in the end."""
        own = {shard.name: shard for shard in self.shards()}
        buffers = dict(self.buffers())
        for name, whole in weights.items():
            if name in buffers:
                buffers[name].copy_(whole)
            elif name in own:
                shard = own[name]
                shard.weight.copy_(whole.flatten()[shard.start : shard.start + len(shard.weight)])

    def sync_compute_weights(self) -> None:
        """After new numbers in the shards: updates the copies that the passes use, where there are any."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks; the same on each."""
        if dist.is_initialized():
            values = values.to(self.accelerator.device)
            dist.all_reduce(values)
        return values.cpu()

    def shutdown(self) -> None:
        """Ends the process groups; without it gloo's threads can crash the interpreter at exit."""
        self.accelerator.end_training()
        time.sleep(0.2)


def set_timeouts(config: TrainConfig) -> None:
    """Of all process groups: DeepSpeed clones them and drops the timeout on the way."""
    for group in list(distributed_c10d._world.pg_map):
        # Longer than the watchdog's limit, which says more.
        distributed_c10d._set_pg_timeout(timedelta(seconds=2 * config.engine.timeout_s), group)


def gather_objects(own: Any) -> list[Any]:
    """The objects of all ranks, by rank, as torch's all_gather_object but as JSON, since unpickling what a peer sends
    may run any code. Tuples become lists. UserError on all ranks if one sends more than OBJECT_BYTES or no JSON."""
    if not dist.is_initialized():
        return [own]
    device = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else None
    sent, ranks = json.dumps(own).encode(), range(dist.get_world_size())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in ranks]
    dist.all_gather(sizes, torch.tensor([len(sent)], device=device))
    longest = max(int(size) for size in sizes)
    if longest > OBJECT_BYTES or min(int(size) for size in sizes) < 1:
        raise UserError(f"a rank sends the others {longest} bytes, of {OBJECT_BYTES} at most")
    received = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in ranks]
    dist.all_gather(received, torch.tensor(list(sent.ljust(longest)), dtype=torch.uint8, device=device))
    texts = [bytes(text.tolist())[: int(size)] for text, size in zip(received, sizes, strict=True)]
    return [parse_json(text, f"what rank {rank} sends") for rank, text in enumerate(texts)]
