"""Losses that are not finite, and too little memory, on every engine."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_runs import ENGINES, SPOILED, compare, long, train
from tiny_training import ROOT, STEPS, launch, read_metrics, run, saved_weights

from model.world import newest_checkpoint


@pytest.mark.parametrize(("policy", "status"), [("stop", 1), ("skip", 0)])
def test_a_loss_that_is_nan_on_one_rank_stops_all_or_is_skipped(train_args, tmp_path, policy: str, status: int) -> None:
    args = "engine.name=ddp", "batch=1", "accumulation=2", f"on_nonfinite={policy}", "checkpoint.every=2"
    done = run([*launch("cpu_plain", *SPOILED), *train_args, *args, f"out={tmp_path}"], SPOIL_MICRO="2")
    printed = done.stdout + done.stderr
    assert done.returncode == status, printed[-3000:]
    if policy == "stop":
        fault = next(line for line in printed.splitlines() if "not finite" in line)
        assert "step 3" in fault and "rank 1" in fault and "rank 0" not in fault and "episode_" in fault
        assert newest_checkpoint(tmp_path).name == "step_0000002"
        return
    lines = [line for line in read_metrics(tmp_path) if "skipped_steps" in line]
    assert [line["step"] for line in lines if line["skipped_steps"]] == [4] and len(lines) == STEPS
    assert all(tensor.isfinite().all() for tensor in saved_weights(tmp_path, "model").values())


def train_spoiled(engine: str, ranks: int, out: Path, *args: str, accumulation: int = 2, **env: str) -> None:
    """A run with a NaN in step 3, which it leaves out."""
    args = *args, "steps=8", "on_nonfinite=skip"
    train(engine, ranks, out, *args, accumulation=accumulation, program=SPOILED, PYTHONPATH=str(ROOT), **env)


@pytest.fixture(scope="module")
def skipping(train_args, tmp_path_factory) -> Path:
    """One process, one micro-step, whose step 3 is NaN and left out."""
    out = tmp_path_factory.mktemp("skipping")
    train_spoiled("ddp", 1, out, *train_args, accumulation=1, SPOIL_RANK="0")
    return out


SKIPS: list[Any] = [("zero2", 1, "fp32", 1), ("zero3", 2, "fp32", 1), ("fsdp2", 1, "fp32", 1)]
SKIPS += map(long, itertools.product(ENGINES, (1, 2), ("fp32", "bf16"), (2,)))


@pytest.mark.parametrize("row", SKIPS, ids=str)
def test_a_micro_step_that_is_nan_on_the_last_rank_takes_the_whole_step_with_it_and_nothing_else(
    skipping, train_args, tmp_path, row: tuple[str, int, str, int]
) -> None:
    engine, micro, precision, ranks = row
    args = *train_args, f"engine.precision={precision}"
    train_spoiled(engine, ranks, tmp_path, *args, SPOIL_RANK=str(ranks - 1), SPOIL_MICRO=str(micro))
    lines = [line for line in read_metrics(tmp_path) if "skipped_steps" in line]
    assert [line["step"] for line in lines if line["skipped_steps"]] == [4] and "loss" not in lines[3]
    compare(tmp_path, skipping, precision)


def test_too_little_memory_is_one_line_that_says_what_to_lower(train_args, tmp_path) -> None:
    args = [*train_args, "engine.name=ddp", "batch=2", f"out={tmp_path}"]
    done = run([sys.executable, *SPOILED, *args], SPOIL="memory", PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "lower batch" in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert "batch=2" in done.stderr and "Traceback" not in done.stderr
