"""Runs of every engine on tiny data, and what two of them must have in common."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_training import launch, losses, run, saved_weights

from configs import load_config
from configs.errors import UserError
from model.world import complete_steps, newest_checkpoint
from train.check import check_run
from train.config import TrainConfig

ENGINES = {
    "zero1": ("cpu_zero2", "engine.stage=1"),
    "zero2": ("cpu_zero2", "engine.stage=2"),
    "zero3": ("cpu_zero2", "engine.stage=3"),
    "zero2 offload": ("cpu_zero2", "engine.stage=2", "engine.offload=optimizer"),
    "zero3 offload": ("cpu_zero2", "engine.stage=3", "engine.offload=all"),
    "fsdp2": ("cpu_plain", "engine.name=fsdp2"),
    "ddp": ("cpu_plain", "engine.name=ddp"),
}
CLIPS = 4  # of one step, on all ranks together
SETTINGS = (
    "steps=20", "optim.learning_rate=1e-3", "checkpoint.every=3", "checkpoint.keep_last=9", "validation.every=100",
)  # fmt: skip

MODULE, SPOILED = ("-m", "train"), ("tests/spoil_one_rank.py",)
WEIGHTS = ("model.safetensors", "ema.safetensors")


def long(row: tuple) -> Any:
    return pytest.param(row, marks=pytest.mark.long)


def train(
    engine: str, ranks: int, out: Path, *args: str, accumulation: int = 2, program: tuple[str, ...] = MODULE, **env: str
) -> str:
    """Trains with an engine on so many ranks, always with the same clips per step, and returns what was printed."""
    config, *settings = ENGINES[engine]
    by_itself = ranks == 1 and config == "cpu_plain"
    start = [sys.executable, *program] if by_itself else launch(config, *program, processes=ranks)
    files = [arg for arg in args if "=" not in arg]  # their settings count less than those of the table
    settings += [f"batch={CLIPS // ranks // accumulation}", f"accumulation={accumulation}", *SETTINGS]
    done = run([*start, *files, *settings, f"out={out}", *(arg for arg in args if "=" in arg)], **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def compare(out: Path, plain: Path, precision: str) -> dict[str, str]:
    """Largest differences of losses, gradient norms and weights; asserts that they are rounding."""
    ours, theirs = losses(out), losses(plain)
    assert (theirs[:, 1] > 0.05).all(), "every step must exceed the clip norm, or the test says nothing about clipping"
    loss, norm = (ours - theirs).abs().amax(dim=0).tolist()
    differences: dict[str, float] = {"loss": loss, "grad_norm": norm}
    for name in ("model", "ema"):
        mine, plains = saved_weights(out, name), saved_weights(plain, name)
        assert mine.keys() == plains.keys()
        differences[name] = max((mine[key] - plains[key]).abs().max().item() for key in mine)
    # Adam turns the rounding of near-zero gradients into a part of a step of 1e-3. A run that does not clip is off by
    # 2.2e-4 in the loss.
    limits = {"fp32": (2e-6, 2e-6, 2e-5, 2e-5), "bf16": (1.5e-4, 1e-3, 1e-2, 1e-2)}[precision]
    assert all(value <= limit for value, limit in zip(differences.values(), limits, strict=True)), differences
    return {name: f"{value:.1e}" for name, value in differences.items()}


def cut_off(out: Path, to: Path, step: int = 3) -> Path:
    """A copy of a run as it was right after its checkpoint of `step`."""
    shutil.copytree(out, to)
    for name in complete_steps(to):
        if name != f"step_{step:07d}":
            shutil.rmtree(to / name)
    return to


def require_equal_files(out: Path, whole: Path, *names: str) -> None:
    for name in names:
        assert (newest_checkpoint(out) / name).read_bytes() == (newest_checkpoint(whole) / name).read_bytes(), name


def alone_config(train_args: list[str], out: Path, *args: str) -> TrainConfig:
    """A run of one process, as `plain`."""
    return load_config(TrainConfig, [*train_args, "engine.name=ddp", f"batch={CLIPS}", *SETTINGS, f"out={out}", *args])


def refusal(config: TrainConfig) -> str:
    """The one line in which a run is refused before it starts."""
    with pytest.raises((UserError, OSError)) as error:
        check_run(config, ranks=1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)
