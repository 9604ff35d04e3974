"""TrainConfig -> Accelerator, DeepSpeed's settings in one function, and the few calls that differ between engines."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from train.config import TrainConfig


def deepspeed_settings(config: TrainConfig) -> dict[str, Any]:
    """Everything DeepSpeed is told; there is no second file that could disagree."""
    return {
        "train_micro_batch_size_per_gpu": config.batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.clip_norm,  # Accelerate's own clipping does not clip under DeepSpeed
        "zero_optimization": {"stage": config.engine.stage},
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
    }


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of `config.engine`; refuses launch forms under which ranks would train unsynchronised."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    launched_for_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if config.engine.name == "deepspeed" and not launched_for_deepspeed:
        raise ValueError(
            "engine.name=deepspeed needs accelerate launch --config_file launch/accelerate/cpu_zero2.yaml -m train ...;"
            " for one plain process say engine.name=ddp"
        )
    if config.engine.name == "ddp" and launched_for_deepspeed:
        raise ValueError("engine.name=ddp under a DeepSpeed launch; leave out the DeepSpeed launch file")
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing deepspeed warns on stdout
    handlers: list[Any] = []
    if world > 1 or config.engine.name == "deepspeed":
        timeout = timedelta(seconds=config.engine.timeout_s)
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout))
    if config.engine.name == "deepspeed":
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_settings(config)),
            gradient_accumulation_steps=config.accumulation,
            mixed_precision="bf16" if config.engine.precision == "bf16" else "no",
            kwargs_handlers=handlers,
        )
        expected = DistributedType.DEEPSPEED
    else:
        accelerator = Accelerator(
            cpu=on_cpu,
            gradient_accumulation_steps=config.accumulation,
            mixed_precision="bf16" if config.engine.precision == "bf16" else "no",
            kwargs_handlers=handlers,
        )
        expected = None
    got = (accelerator.distributed_type, accelerator.num_processes)
    if got[1] != world or (expected and got[0] != expected):
        raise RuntimeError(f"asked for {config.engine.name} on {world} processes, Accelerate gave {got}")
    return accelerator


@dataclass
class Engine:
    """A prepared model with its optimizer; the same calls whatever shards them."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    clip_norm: float
    grad_norm: float = 0.0

    @property
    def sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def module(self) -> nn.Module:
        """The model as it was before the engine wrapped it."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        assert isinstance(unwrapped, nn.Module)
        return unwrapped

    def accumulate(self) -> AbstractContextManager[None]:
        """Surrounds one micro-step; gradients are exchanged and applied at the last of them."""
        return self.accelerator.accumulate(self.model)

    def set_learning_rate(self, rate: float) -> None:
        """Before the backward pass of the step it is for: DeepSpeed steps inside of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-step; at the last one they are clipped and applied, and `grad_norm` is set."""
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return
        if self.sharded:
            self.grad_norm = float(self.model.get_global_grad_norm())  # type: ignore[operator]
            return
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.grad_norm = float(norm) if norm is not None else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()

    def master_weights(self) -> list[Tensor]:
        """The float32 tensors that this rank optimises: its partition under ZeRO, else the parameters."""
        if self.sharded:
            return list(self.optimizer.optimizer.single_partition_of_fp32_groups)
        return [p.data for p in self.module.parameters() if p.requires_grad]

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer by official name, whole and float32, on the CPU. All ranks must iterate."""
        module = self.module
        for name, param in module.named_parameters():
            yield name, self._whole(param).detach().float().cpu().clone()
        for name, buffer in module.named_buffers():
            if name in module.state_dict():
                yield name, buffer.detach().float().cpu().clone()

    def _whole(self, param: nn.Parameter) -> Tensor:
        if not self.sharded:
            return param
        from deepspeed.utils import safe_get_full_fp32_param  # importing deepspeed costs seconds

        whole = safe_get_full_fp32_param(param)
        assert whole is not None
        return whole

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks; the same on each."""
        if dist.is_initialized():
            values = values.to(self.accelerator.device)
            dist.all_reduce(values)
        return values.cpu()

    def save(self, folder: Path) -> None:
        """Optimizer, weights and random states, for `load` on the same number of ranks. All ranks must call.

        Raises OSError when the disk does not take them.
        """
        try:
            self.accelerator.save_state(str(folder), safe_serialization=True)
        except (SafetensorError, RuntimeError) as error:  # the writers' own words for a write that failed
            if "I/O error" in str(error) or "PytorchStreamWriter" in str(error):
                raise OSError(
                    f"cannot write {folder}: {str(error).splitlines()[0]}; the checkpoint before it is whole: "
                    "make room on the disk and run the same command again"
                ) from error
            raise

    def load(self, folder: Path) -> None:
        """What `save` wrote. All ranks must call."""
        self.accelerator.load_state(str(folder))

    def shutdown(self) -> None:
        """Ends the process groups; without it gloo's threads can crash the interpreter at exit."""
        self.accelerator.end_training()
        time.sleep(0.2)


def make_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> Engine:
    """Prepares model and optimizer; the loader is never prepared, since Accelerate would read it on rank 0 alone."""
    if config.engine.name == "ddp" and accelerator.num_processes == 1:
        model = model.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    if dist.is_initialized():
        # DeepSpeed clones the groups and drops the timeout on the way.
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=config.engine.timeout_s), group)
    return Engine(accelerator, model, optimizer, config.optim.clip_norm)
