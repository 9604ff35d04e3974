"""Training runs of a few steps in processes of their own, and reading what they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.weights import load_weights
from model.world import newest_checkpoint

STEPS = 8
ROOT = Path(__file__).parent.parent
ALONE = [sys.executable, "-m", "train"]


def launch(config: str, *program: str, processes: int = 2) -> list[str]:
    """`accelerate launch` of `program` with a file of launch/accelerate."""
    starter = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{config}.yaml"]
    return [*starter, "--num_processes", str(processes), "--main_process_port", "0", *program]


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


def start(command: list[str], log: Path, ready: Callable[[], object]) -> subprocess.Popen[bytes]:
    """A process of the command, once `ready` is true or it has ended."""
    with open(log, "w") as file:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=env, start_new_session=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and not ready() and time.monotonic() < deadline:
        time.sleep(0.001)
    return process


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> Tensor:
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in read_metrics(out) if "loss" in line])


def saved_weights(out: Path, name: str) -> dict[str, Tensor]:
    """The `model` or `ema` weights of a run's newest checkpoint."""
    return load_weights(newest_checkpoint(out) / f"{name}.safetensors")


def require_equal_bits(out: Path, whole: Path) -> None:
    """Metrics, weights and their average of two runs."""
    assert torch.equal(losses(out), losses(whole))
    for name in ("model", "ema"):
        ours, theirs = saved_weights(out, name), saved_weights(whole, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
