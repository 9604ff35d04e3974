"""What a training run is told: one frozen dataclass, read from YAML files and key=value words."""

from dataclasses import dataclass
from typing import Any, Literal

from model.action_dit import ActionDiTConfig, CompileMode
from model.flow import FlowMatchConfig

STOPPED = "STOPPED"  # in the run folder, while a run that was asked to stop has not gone on


@dataclass(frozen=True)
class EngineConfig:
    """How the model is put on processes."""

    name: Literal["deepspeed", "fsdp2", "ddp"] = "deepspeed"
    stage: int = 2  # of ZeRO: 1 cuts up the optimizer's states, 2 the gradients too, 3 the weights too
    offload: Literal["nothing", "optimizer", "all"] = "nothing"  # to the CPU; all: the weights too
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: CompileMode = "no"  # torch.compile of the model's blocks
    timeout_s: float = 600.0  # after which a step, its data, a validation or a save has taken too long: a peer is lost

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"engine.stage={self.stage}: ZeRO has stages 1, 2 and 3, use one of them")
        wants = {("deepspeed", "optimizer"): 1, ("deepspeed", "all"): 3, ("fsdp2", "all"): 0}
        least = 0 if self.offload == "nothing" else wants.get((self.name, self.offload))
        if least is None or self.stage < least:
            raise ValueError(
                f"engine.offload={self.offload} is not for engine.name={self.name} engine.stage={self.stage}; "
                "optimizer goes with deepspeed, all with deepspeed of stage 3 and with fsdp2"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate, which is a pure function of the step."""

    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_steps: int = 0  # steps at the end over which the rate falls linearly to zero
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01  # of matrices only
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 500  # steps; the last step and a stop always write one
    keep_last: int = 2
    background: bool = False  # write while training goes on, from a copy of this rank's part in the CPU's memory
    keep_every: int = 0  # steps: every checkpoint whose step this divides stays too; 0: none

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or self.keep_every < 0:
            raise ValueError(
                f"checkpoint.every={self.every} and checkpoint.keep_last={self.keep_last} must be 1 or more, "
                f"checkpoint.keep_every={self.keep_every} 0 or more"
            )


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out velocity loss during training, with the right actions and with shuffled ones."""

    manifest: str | None = None
    every: int = 250  # steps
    clips: int = 32


@dataclass(frozen=True)
class TrainConfig:
    """What `python -m train` is told."""

    model: ActionDiTConfig
    flow: FlowMatchConfig
    manifest: str  # of the training shards
    codec: str  # folder of the codec that made them
    out: str  # run folder: metrics.jsonl and the checkpoints
    steps: int
    objective: dict[str, Any]  # name: and the fields of that objective
    init: str | None = None  # checkpoint or run folder whose weights training starts from
    init_weights: Literal["ema", "model"] = "ema"
    batch: int = 4  # clips per process and micro-step
    accumulation: int = 1  # micro-steps per optimizer step
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss that is NaN or infinite on any rank does to the run
    ema_decay: float = 0.995
    seed: int = 0
    workers: int = 1  # loader lanes per process
    log_every: int = 10  # steps between lines of metrics.jsonl
    wandb: bool = False  # WANDB_MODE=offline works without an account
    wandb_project: str = "worldloom"
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.on_nonfinite == "skip" and self.accumulation > 1:
            raise ValueError(
                f"on_nonfinite=skip cannot take back the earlier micro-steps of accumulation={self.accumulation}; use "
                "on_nonfinite=stop, or accumulation=1 with a larger batch"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
