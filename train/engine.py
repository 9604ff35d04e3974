"""TrainConfig -> Accelerator, DeepSpeed's settings in one function, and the few calls that differ between engines."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from configs.errors import UserError
from configs.foreign import parse_json
from train.config import TrainConfig
from train.optim import make_optimizer
from train.state import Fragment, SavedState

OBJECT_BYTES = 1 << 20  # of what a rank tells the others by `gather_objects`


def deepspeed_settings(config: TrainConfig) -> dict[str, Any]:
    """Everything DeepSpeed is told; there is no second file that could disagree."""
    engine, zero = config.engine, dict[str, Any](stage=config.engine.stage)
    if engine.offload != "nothing":
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.clip_norm,  # Accelerate's own clipping does not clip under DeepSpeed
        "zero_optimization": zero,
        "bf16": {"enabled": engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW has a kernel for CPUs too, and needs no compiler
    }


def describe_engine(config: TrainConfig) -> dict[str, Any]:
    """What the engine of `config` is told, as plain words and numbers."""
    if config.engine.name == "deepspeed":
        return {"deepspeed": deepspeed_settings(config)}
    bf16 = config.engine.precision == "bf16"
    if config.engine.name == "fsdp2":
        return {
            "fsdp2": {
                "fully_shard": ["each of blocks", "the model"],
                "param_dtype": "bfloat16" if bf16 else "float32",
                "reduce_dtype": "float32",
                "offload": config.engine.offload,
                "gradient_accumulation_steps": config.accumulation,
                "gradient_clipping": config.optim.clip_norm,
            }
        }
    return {
        "ddp": {
            "autocast": "bfloat16" if bf16 else "no",
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": config.optim.clip_norm,
        }
    }


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of `config.engine`; refuses launch forms under which ranks would train unsynchronised."""
    engine, world = config.engine, int(os.environ.get("WORLD_SIZE", "1"))
    launched_for_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if engine.name == "deepspeed" and not launched_for_deepspeed:
        raise UserError(
            "engine.name=deepspeed needs accelerate launch --config_file launch/accelerate/cpu_zero2.yaml -m train ...;"
            " for one plain process say engine.name=ddp"
        )
    if engine.name != "deepspeed" and launched_for_deepspeed:
        raise UserError(f"engine.name={engine.name} under a DeepSpeed launch; use launch/accelerate/cpu_plain.yaml")
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing deepspeed warns on stdout
    backend, handlers = "gloo" if on_cpu else "nccl", list[Any]()
    if not on_cpu and engine.name == "fsdp2" and engine.offload == "all":
        backend = "cuda:nccl,cpu:gloo"  # its gradients lie on the CPU, and their norm is summed there
    if world > 1 or engine.name == "deepspeed":
        timeout = timedelta(seconds=engine.timeout_s)
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    mixed = "bf16" if engine.precision == "bf16" and engine.name != "fsdp2" else "no"  # FSDP2 casts by itself
    deepspeed = engine.name == "deepspeed"
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,  # with it, Accelerate drops DeepSpeed without a word
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(config)) if deepspeed else None,
        gradient_accumulation_steps=config.accumulation,
        mixed_precision=mixed,
        kwargs_handlers=handlers,
    )
    expected = DistributedType.DEEPSPEED if deepspeed else None
    if engine.name == "fsdp2" and not dist.is_initialized():  # one process by itself
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    _set_timeouts(config)
    got = (accelerator.distributed_type, accelerator.num_processes)
    if got[1] != world or (expected and got[0] != expected):
        raise RuntimeError(f"asked for {engine.name} on {world} processes, Accelerate gave {got}")
    return accelerator


@dataclass
class Engine:
    """A prepared model with its optimizer; the same calls whatever shards them. This one shards nothing: one process,
    or several under DDP."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    config: TrainConfig
    grad_norm: float = 0.0  # of the newest step that was applied, before clipping

    @property
    def module(self) -> nn.Module:
        """The model as it was before the engine wrapped it."""
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
        """Gradients of one micro-step. At the last one they are clipped and applied, and `grad_norm` is set; but if
        their norm is not finite, or without `apply`, all of the step's are dropped. Whether they were not dropped."""
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

    def fragments(self) -> list[Fragment]:
        """What this rank optimises, in float32, and answers for in a checkpoint: here the whole, on every rank."""
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [Fragment(name, 0, p.data.view(-1), p, 0) for name, p in trained]

    all_write_state = False  # whether every rank's fragments are its own

    @property
    def writes_state(self) -> bool:
        """Whether this rank's fragments go into a checkpoint."""
        return self.all_write_state or self.accelerator.is_main_process

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The module's buffers that its weights files carry."""
        kept = self.module.state_dict().keys()
        return ((name, buffer) for name, buffer in self.module.named_buffers() if name in kept)

    def restore(self, saved: SavedState) -> None:
        """Weights, moments and buffers of a saved run. All ranks must call."""
        saved.restore(self.fragments(), self.adam)
        for name, buffer in self.buffers():
            buffer.copy_(saved.read("weight", name, 0, buffer.numel()).reshape(buffer.shape))
        self.refresh()

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Takes this rank's runs of some whole parameters, and whole buffers; `refresh` must follow in the end."""
        own = {part.name: part for part in self.fragments()}
        buffers = dict(self.buffers())
        for name, whole in weights.items():
            if name in buffers:
                buffers[name].copy_(whole)
            elif name in own:
                part = own[name]
                part.weight.copy_(whole.flatten()[part.start : part.start + len(part.weight)])

    def refresh(self) -> None:
        """After new numbers in the fragments: whatever the engine keeps beside them."""

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


def gather_objects(own: Any) -> list[Any]:
    """What every rank gives, by rank; the same on each. For rare and small things, which travel as JSON: torch's own
    collectives of objects unpickle what a peer sends, which may be any code. Tuples become lists.

    Raises ValueError on all ranks if one sends more than OBJECT_BYTES, or what is no JSON.
    """
    if not dist.is_initialized():
        return [own]
    device = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else None
    sent, ranks = json.dumps(own).encode(), range(dist.get_world_size())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in ranks]
    dist.all_gather(sizes, torch.tensor([len(sent)], device=device))
    room = max(int(size) for size in sizes)
    if room > OBJECT_BYTES or min(int(size) for size in sizes) < 1:
        raise UserError(f"a rank tells the others {room} bytes, of {OBJECT_BYTES} at most")
    found = [torch.zeros(room, dtype=torch.uint8, device=device) for _ in ranks]
    dist.all_gather(found, torch.tensor(list(sent.ljust(room)), dtype=torch.uint8, device=device))
    told = [bytes(one.tolist())[: int(size)] for one, size in zip(found, sizes, strict=True)]
    return [parse_json(text, f"what rank {rank} says") for rank, text in enumerate(told)]


def make_engine(accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> Engine:
    """Prepares model and optimizer; the loader is never prepared, since Accelerate would read it on rank 0 alone.

    A model on the meta device gets memory for this rank's part alone, without numbers: `fill` must follow.
    """
    from train.fsdp2 import Fsdp2Engine, shard  # these two build on this module
    from train.zero import ZeroEngine, cut_up

    if config.engine.name == "fsdp2":
        model = shard(model, config, accelerator.device)
        return Fsdp2Engine(accelerator, model, make_optimizer(model, config.optim), config)
    if config.engine.name == "ddp" and accelerator.num_processes == 1:
        model = model.to(accelerator.device)
    if next(model.parameters()).is_meta:
        cut_up(model, config, accelerator.device)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config.optim))
    _set_timeouts(config)
    kind = ZeroEngine if config.engine.name == "deepspeed" else Engine
    return kind(accelerator, model, optimizer, config)


def _set_timeouts(config: TrainConfig) -> None:
    """Of all process groups: DeepSpeed clones them and drops the timeout on the way."""
    for group in list(distributed_c10d._world.pg_map):
        # A little longer than the watchdog's, which knows better what to say.
        distributed_c10d._set_pg_timeout(timedelta(seconds=2 * config.engine.timeout_s), group)
