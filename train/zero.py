"""DeepSpeed ZeRO 1, 2 and 3: optimizer states, gradients and weights sharded over the ranks."""

import math
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from model.action_dit import ActionDiT
from train.config import EngineConfig, TrainConfig
from train.engine import MIXED_PRECISION, Engine, group_timeout
from train.memory import give_back
from train.optim import make_optimizer
from train.state import ParamShard

BUCKET = 500_000_000  # numbers of a buffer for gradients that are exchanged: DeepSpeed's reduce_bucket_size
MOST_GATHERED = 1_000_000_000  # of weights that stage 3 keeps whole for a while: its stage3_max_live_parameters
PREFETCHED = 50_000_000  # of the next weights: its stage3_prefetch_bucket_size


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """All of DeepSpeed's settings; there is no second file that could disagree."""
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
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs too, without a compiler
    }


def shard(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Gives each part of a `model` on the meta device memory in turn, and shards it over the ranks before the next. The
    weights are zeros."""
    from deepspeed.runtime.zero.partition_parameters import Init  # costs a second, and prints

    assert isinstance(model, ActionDiT)
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    model.to(dtype)
    for _, part in model.submodules():
        part.to_empty(device=device)
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.detach().zero_()
        Init(module=part, config_dict_or_path=deepspeed_config(config), dtype=dtype)
        give_back()


class ZeroEngine(Engine):
    """DeepSpeed clips and steps inside the backward pass of the last micro-step."""

    all_write_state = True

    @staticmethod
    def options(config: EngineConfig) -> dict[str, tuple[str, ...]]:
        return {} if config.stage == 3 else {"offload": ("nothing", "optimizer"), "build": ("whole",)}

    @classmethod
    def accelerate_args(cls, config: TrainConfig) -> dict[str, Any]:
        # Not `cpu`: with it, Accelerate drops DeepSpeed without a word.
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config))
        return {"deepspeed_plugin": plugin, "mixed_precision": MIXED_PRECISION[config.engine.precision]}

    @staticmethod
    def state_bytes(config: TrainConfig, parameters: int, moments: int, ranks: int, on_cpu: bool) -> dict[str, int]:
        width, share = 2 if config.engine.precision == "bf16" else 4, parameters // ranks
        bucket = min(parameters, BUCKET) if on_cpu else BUCKET
        states = {"float32 weights": 4 * share, "optimizer's states": 4 * moments // ranks, "exchanged": width * bucket}
        if config.engine.stage < 3:
            return {**states, "weights": width * parameters, "gradients": width * parameters}
        gathered = width * (min(parameters, MOST_GATHERED) + min(parameters, PREFETCHED))
        shares = {"weights": width * share, "gradients": width * (share + parameters)}
        return {**states, **shares, "gathered weights": gathered}

    @classmethod
    def prepare(cls, accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> Self:
        if next(model.parameters()).is_meta:
            shard(model, config, accelerator.device)
        wrapped: Any = accelerator.prepare(model, make_optimizer(model, config.optim))[0]
        for group in list(distributed_c10d._world.pg_map):  # DeepSpeed has cloned them without their timeouts
            distributed_c10d._set_pg_timeout(group_timeout(config), group)
        return cls(accelerator, wrapped, wrapped.optimizer.optimizer, config)

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer around torch's, which holds the float32 weights."""
        return self.model.optimizer

    def backward(self, loss: Tensor, apply: bool = True) -> bool:
        # DeepSpeed drops a step only if the norm of its gradients is not finite, so a loss to be dropped becomes NaN.
        self.accelerator.backward(loss if apply else loss * math.nan)
        if not self.accelerator.sync_gradients:
            return True
        if self.zero.overflow:
            return False
        assert apply, "DeepSpeed applied gradients that are NaN"
        self.grad_norm = float(self.model.get_global_grad_norm())  # type: ignore[operator]
        return True

    def shards(self) -> list[ParamShard]:
        """Stages 1 and 2 cut each group of parameters, as one flat tensor, into equal parts; stage 3 each parameter."""
        shards, stage3, owners = [], self.config.engine.stage == 3, dict[int, Tensor]()
        if not stage3:
            parts = zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True)
            owners = {id(p): owner for group, owner in parts for p in group}
        for name, p in self.module.named_parameters():
            param: Any = p  # with DeepSpeed's fields
            if stage3:
                group, offset, share = self.zero.grad_position[self.zero.get_param_id(p)]
                owner, start = self.zero.fp32_partitioned_groups_flat[group], share * self.accelerator.process_index
                length = max(0, min(share, param.ds_numel - start))  # the last part is padded
            else:
                owner, offset, start, length = owners[id(p)], 0, 0, 0
                if link := getattr(param, "_hp_mapping", None):  # else wholly in another rank's part
                    offset, start = link.hp_fragment_address.start, link.lp_fragment_address.start
                    length = link.lp_fragment_address.numel
            shards.append(ParamShard(name, start, owner.data[offset : offset + length], owner, offset))
        return shards

    @torch.no_grad()
    def sync_compute_weights(self) -> None:
        if self.config.engine.stage != 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()  # gathered ones would keep their old numbers
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:  # small ones, which every rank keeps whole
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
