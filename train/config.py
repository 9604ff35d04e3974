"""What a training run is told: one frozen dataclass, read from YAML files and key=value words."""

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.errors import UserError
from data_pipeline.stream import LoaderConfig
from data_pipeline.types import Source
from model.action_dit import CompileMode
from model.config import ActionDiTConfig
from model.flow import FlowMatchConfig
from model.layout import CHUNK_FRAMES
from sampling.denoising import Denoising

MOST_STEPS = 9_999_999  # the names of checkpoints have seven digits
MOST_CLIPS = 65_536  # of a micro-step and process, and micro-steps of a step: more is a slip of the finger
MOST_SEED = 2**63 - 1
BELOW_1 = 1 - 1e-9


def require_within(low: float, high: float, **values: float) -> None:
    """A UserError for the first of the settings `values` (`__` for the dots of a name) that is not in [low, high]."""
    for name, value in values.items():
        if not low <= value <= high:
            raise UserError(f"{name.replace('__', '.')}={value} must lie between {low} and {high}")


@dataclass(frozen=True)
class EngineConfig:
    """How the model is put on processes."""

    name: str = "deepspeed"  # of train/engines.py
    stage: Literal[1, 2, 3] = 2  # of ZeRO: 1 cuts up the optimizer's states, 2 the gradients too, 3 the weights too
    offload: Literal["nothing", "optimizer", "all"] = "nothing"  # to the CPU; all: the weights too
    build: Literal["whole", "sharded"] = "whole"  # sharded: part by part, no process ever holding the whole model
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: CompileMode = "no"  # torch.compile of the model's blocks
    # After which building, loading, a step, its data, a validation or a save has taken too long: a peer is lost.
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        require_within(0.1, 1e6, engine__timeout_s=self.timeout_s)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate, which is a pure function of the step."""

    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_steps: int = 0  # steps at the end over which the rate falls linearly to zero
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01  # of matrices only
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down

    def __post_init__(self) -> None:
        require_within(0, 10, optim__learning_rate=self.learning_rate, optim__weight_decay=self.weight_decay)
        require_within(0, MOST_STEPS, optim__warmup_steps=self.warmup_steps, optim__decay_steps=self.decay_steps)
        require_within(1e-9, 1e9, optim__clip_norm=self.clip_norm)
        for beta in self.betas:
            require_within(0, BELOW_1, optim__betas=beta)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    folder: str | None = None  # an s3:// url that gets them, and copies of the run's other files; as `out` itself does
    every: int = 500  # steps; the last step and a stop always write one
    keep_last: int = 2
    background: bool = False  # write while training goes on, from a copy of this rank's part in the CPU's memory
    keep_every: int = 0  # steps: every checkpoint whose step this divides stays too; 0: none

    def __post_init__(self) -> None:
        require_within(1, MOST_STEPS, checkpoint__every=self.every, checkpoint__keep_last=self.keep_last)
        require_within(0, MOST_STEPS, checkpoint__keep_every=self.keep_every)


@dataclass(frozen=True)
class VideosConfig:
    """Videos by the averaged weights, from held-out pictures, with the same actions and the same noise every time."""

    every: int = 0  # steps, and the last one; 0: none
    prompts: int = 2  # held-out clips, spread over the set, whose first frames begin a video each
    actions: tuple[str, ...] = ("random",)  # scripts as of sampling generate, side by side in each video
    frames: int = 54  # at the game's rate, the prompt included
    steps: int = 4  # Euler steps per chunk or block
    few_steps: tuple[int, ...] = ()  # instead of steps the list of a few-step model: [1000,666,333]
    guidance: float = 1.0  # by actions
    seed: int = 0  # of `random` and of the noise
    vision: str | None = None  # weights of CLIP's vision tower, for a model with vision

    def __post_init__(self) -> None:
        require_within(0, MOST_STEPS, validation__videos__every=self.every)
        require_within(0, MOST_SEED, validation__videos__seed=self.seed)
        require_within(1, 1000, validation__videos__prompts=self.prompts)
        require_within(CHUNK_FRAMES, 10_000, validation__videos__frames=self.frames)
        require_within(1, 64, validation__videos__actions=len(self.actions))
        _ = self.denoising  # checks of its own

    @property
    def denoising(self) -> Denoising:
        return Denoising(self.steps, self.few_steps, guidance=self.guidance)


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out velocity loss during training, with the right actions and with shuffled ones; and videos."""

    manifest: str | None = None
    every: int = 250  # steps
    clips: int = 32
    videos: VideosConfig = VideosConfig()

    def __post_init__(self) -> None:
        require_within(1, MOST_STEPS, validation__every=self.every)
        require_within(1, 1_000_000, validation__clips=self.clips)
        if self.videos.every and self.manifest is None:
            raise UserError("validation.videos begins with held-out pictures: give validation.manifest=")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, for chrome://tracing or ui.perfetto.dev."""

    start: int = 10  # the steps before it: the first ones of a process are slower than those that follow
    steps: int = 0  # 0: none
    every_rank: bool = False  # else of rank 0

    def __post_init__(self) -> None:
        require_within(0, MOST_STEPS, profile__start=self.start, profile__steps=self.steps)


@dataclass(frozen=True)
class TrainConfig:
    """What `python -m train` is told."""

    model: ActionDiTConfig
    flow: FlowMatchConfig
    codec: str  # folder of the codec that made them
    out: str  # run folder, or its s3:// url: metrics.jsonl and the checkpoints
    steps: int
    objective: dict[str, Any]  # name: and the fields of that objective
    manifest: str | None = None  # of the training shards
    manifests: tuple[Source, ...] = ()  # instead of `manifest`: [{path: ..., weight: 2.0}, ...] are mixed
    init: str | None = None  # checkpoint or run folder whose averaged weights training starts from
    resume: str | None = None  # checkpoint of another run that this one, in its own `out`, goes on from: a branch of it
    batch: int = 4  # clips per process and micro-step
    accumulation: int = 1  # micro-steps per optimizer step
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss that is NaN or infinite on any rank does to the run
    ema_decay: float = 0.995
    seed: int = 0
    workers: int = 1  # loader threads per process
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    log_every: int = 10  # steps between lines of metrics.jsonl
    wandb: bool = False  # WANDB_MODE=offline works without an account
    wandb_project: str = "worldloom"
    tensorboard: bool = False  # events in the run folder; needs the package
    peak_tflops: float | None = None  # of one device, dense, at engine.precision, as its maker states it; gives `mfu`
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
    def checkpoints(self) -> str:
        """The folder or url of the run's checkpoints."""
        return self.checkpoint.folder or self.out

    def __post_init__(self) -> None:
        require_within(1, MOST_STEPS, steps=self.steps, log_every=self.log_every)
        require_within(1, MOST_CLIPS, batch=self.batch, accumulation=self.accumulation)
        require_within(0, MOST_SEED, seed=self.seed)
        require_within(0, 1024, workers=self.workers)
        if (self.manifest is None) == (not self.manifests):
            raise UserError("give the training shards, as manifest=... or as manifests=[{path: ..., weight: ...}]")
        require_within(0, BELOW_1, ema_decay=self.ema_decay)
        if self.peak_tflops is not None:
            require_within(1e-6, 1e6, peak_tflops=self.peak_tflops)
        if self.profile.steps and self.profile.start + self.profile.steps > self.steps:
            raise UserError(f"profile.start + profile.steps is beyond the run's steps={self.steps}; begin earlier")
