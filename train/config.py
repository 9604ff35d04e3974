"""The settings of a training run: one frozen dataclass, read from YAML files and key=value arguments."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs import cache, storage, within
from configs.errors import UserError
from data_pipeline.stream import LoaderConfig
from data_pipeline.types import Source
from model.action_dit import CompileMode
from model.config import ActionDiTConfig
from model.flow import FlowMatchConfig
from model.layout import CHUNK_FRAMES
from model.limits import BELOW_1
from sampling.denoising import Denoising

MOST_STEPS = 9_999_999  # the names of checkpoints have seven digits
MOST_CLIPS = 65_536  # of a micro-step and process, and micro-steps of a step: more is a typing error
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class EngineConfig:
    """How the model is put on processes."""

    name: str = "deepspeed"  # of train/engines.py
    stage: Literal[1, 2, 3] = 2  # of ZeRO: 1 shards the optimizer's states, 2 the gradients too, 3 the weights too
    offload: Literal["nothing", "optimizer", "all"] = "nothing"  # to the CPU; all: the weights too
    build: Literal["whole", "sharded"] = "whole"  # sharded: part by part, no process ever holding the whole model
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: CompileMode = "no"  # torch.compile of the model's blocks
    # After which building, loading, a step, its data, a validation or a save has taken too long: a peer is lost.
    timeout_s: float = within(0.1, 1e6, 600.0)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rates, which are pure functions of the step."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks; AdamW for all other weights
    learning_rate: float = within(0, 10, 1e-3)  # of AdamW
    matrix_learning_rate: float = within(0, 10, 3e-3)  # of Muon, whose steps are then as large as AdamW's
    warmup_steps: int = within(0, MOST_STEPS, 50)
    decay_steps: int = within(0, MOST_STEPS, 0)  # at the end, over which the rates fall linearly to zero
    betas: tuple[float, float] = within(0, BELOW_1, (0.9, 0.95))
    weight_decay: float = within(0, 10, 0.01)  # of matrices only
    clip_norm: float = within(1e-9, 1e9, 1.0)  # global gradient norm above which gradients are scaled down


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = within(1, MOST_STEPS, 500)  # steps; the last step and a stop always write one
    keep_last: int = within(1, MOST_STEPS, 2)
    background: bool = False  # write while training goes on, from a copy of this rank's part in the CPU's memory
    keep_every: int = within(0, MOST_STEPS, 0)  # every checkpoint whose step this divides stays too; 0: none


@dataclass(frozen=True)
class VideosConfig:
    """Videos by the averaged weights, from held-out pictures, with the same actions and the same noise every time."""

    every: int = within(0, MOST_STEPS, 0)  # steps, and the last one; 0: none
    prompts: int = within(1, 1000, 2)  # held-out clips, spread over the set, whose first frames begin a video each
    actions: tuple[str, ...] = ("random",)  # scripts as of sampling generate, side by side in each video
    frames: int = within(CHUNK_FRAMES, 10_000, 54)  # at the game's rate, the prompt included
    steps: int = 4  # Euler steps per chunk or block
    few_steps: tuple[int, ...] = ()  # instead of steps the list of a few-step model: [1000,666,333]
    guidance: float = 1.0  # by actions
    seed: int = within(0, MOST_SEED, 0)  # of `random` and of the noise
    vision: str | None = None  # weights of CLIP's vision tower, for a model with vision

    def __post_init__(self) -> None:
        if not 1 <= len(self.actions) <= 64:
            raise UserError(f"validation.videos.actions must hold 1 to 64 scripts, not {len(self.actions)}")
        _ = self.denoising  # checks of its own

    @property
    def denoising(self) -> Denoising:
        return Denoising(self.steps, self.few_steps, guidance=self.guidance)


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out velocity loss during training, with the right actions and with shuffled ones; and videos."""

    manifest: str | None = None
    every: int = within(1, MOST_STEPS, 250)  # steps
    clips: int = within(1, 1_000_000, 32)
    videos: VideosConfig = VideosConfig()

    def __post_init__(self) -> None:
        if self.videos.every and self.manifest is None:
            raise UserError("validation.videos begins with held-out pictures: give validation.manifest=")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, for chrome://tracing or ui.perfetto.dev."""

    start: int = within(0, MOST_STEPS, 10)  # steps before it: the first of a process are slower than those that follow
    steps: int = within(0, MOST_STEPS, 0)  # 0: none
    every_rank: bool = False  # else of rank 0


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `python -m train`."""

    model: ActionDiTConfig
    flow: FlowMatchConfig
    codec: str  # folder of the codec that made the clips
    out: str  # run folder, or its s3:// url: metrics.jsonl and the checkpoints
    objective: dict[str, Any]  # name: and the fields of that objective
    steps: int = within(1, MOST_STEPS)
    manifest: str | None = None  # of the training shards
    manifests: tuple[Source, ...] = ()  # instead of `manifest`: [{path: ..., weight: 2.0}, ...] are mixed
    init: str | None = None  # checkpoint or run folder whose averaged weights training starts from
    resume: str | None = None  # checkpoint of another run that this one, in its own `out`, goes on from: a branch of it
    batch: int = within(1, MOST_CLIPS, 4)  # clips per process and micro-step
    accumulation: int = within(1, MOST_CLIPS, 1)  # micro-steps per optimizer step
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss that is NaN or infinite on any rank does to the run
    ema_decay: float = within(0, BELOW_1, 0.995)
    seed: int = within(0, MOST_SEED, 0)
    workers: int = within(0, 1024, 1)  # loader threads per process
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    log_every: int = within(1, MOST_STEPS, 10)  # steps between lines of metrics.jsonl
    wandb: bool = False  # WANDB_MODE=offline works without an account
    wandb_project: str = "worldloom"
    tensorboard: bool = False  # events in the run folder; needs the package
    # Of one device, dense, at engine.precision, as its maker states it; gives `mfu`.
    peak_tflops: float | None = within(1e-6, 1e6, None)
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The shard sets to train on."""
        return self.manifests or (Source(str(self.manifest)),)

    @property
    def folder(self) -> Path:
        """The run's folder on this machine, where files can be appended to and locked: `out`, or one in the cache."""
        return cache.run_folder(self.out) if storage.is_s3(self.out) else Path(self.out)

    def __post_init__(self) -> None:
        if (self.manifest is None) == (not self.manifests):
            raise UserError("give the training shards, as manifest=... or as manifests=[{path: ..., weight: ...}]")
        if self.profile.steps and self.profile.start + self.profile.steps > self.steps:
            raise UserError(f"profile.start + profile.steps is beyond the run's steps={self.steps}; begin earlier")
