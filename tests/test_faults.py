"""Ranks are killed at random moments, again and again: the run goes on every time and ends as if nothing had been."""

import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from tiny_training import launch, losses, require_equal_bits, run, start

from model.world import COMPLETE, complete_steps

COMMAND = [*launch("cpu_zero2", "-m", "train")]
SETTINGS = ["batch=1", "accumulation=2", "checkpoint.every=2", "validation.every=100"]
MOMENTS = ("training", "saving", "saved")


@pytest.fixture(scope="module")
def uninterrupted(train_args, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    done = run([*COMMAND, *train_args, *SETTINGS, f"out={out}"])
    assert done.returncode == 0, done.stderr
    return out


def kill_once(command: list[str], out: Path, moment: str, everybody: bool, rng: random.Random) -> bool:
    """Starts the run and kills -9 one rank or all of it at the moment; whether it was still there to be killed."""
    known, metrics = set(out.glob("step_*")), out / "metrics.jsonl"

    def lines() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    target = lines() + rng.randint(0, 3)

    def reached() -> bool:
        if moment == "training":
            return lines() > target
        new = set(out.glob("step_*")) - known
        return any((folder / COMPLETE).exists() == (moment == "saved") for folder in new)

    process = start(command, out.parent / f"{out.name}.log", reached)
    if moment == "training":
        time.sleep(rng.random() * 0.2)
    alive = process.poll() is None
    if alive:
        ranks = psutil.Process(process.pid).children()
        for victim in ranks if everybody else [rng.choice(ranks)] if ranks else []:
            victim.kill()
        if everybody:
            process.kill()
    process.wait(timeout=120)
    for left in psutil.process_iter():  # of a launcher that was killed itself
        with suppress(ProcessLookupError):
            if os.getsid(left.pid) == process.pid:
                left.kill()
    return alive


def kill_again_and_again(command: list[str], out: Path, uninterrupted: Path, kills: int, seed: int) -> list[str]:
    """What was done; asserts that the run then ends with the uninterrupted one's weights and metrics."""
    rng, log = random.Random(seed), []
    for i in range(3 * kills):
        if len(log) == kills:
            break
        moment, everybody = MOMENTS[i % len(MOMENTS)], rng.random() < 0.5
        if kill_once(command, out, moment, everybody, rng):
            whole = [folder.name for folder in out.glob("step_*") if (folder / COMPLETE).exists()]
            log.append(f"{'all' if everybody else 'one rank'} while {moment}: complete are {', '.join(sorted(whole))}")
        else:  # it had come to its end first: begin anew
            shutil.rmtree(out)
            out.mkdir()
    assert len(log) == kills, log
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    require_equal_bits(out, uninterrupted)
    return log


def test_a_run_survives_three_kills(train_args, uninterrupted, tmp_path) -> None:
    command = [*COMMAND, *train_args, *SETTINGS, f"out={tmp_path}", "checkpoint.background=true"]
    kill_again_and_again(command, tmp_path, uninterrupted, kills=3, seed=0)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_survives_twenty_kills(train_args, uninterrupted, tmp_path, background: str) -> None:
    command = [*COMMAND, *train_args, *SETTINGS, f"out={tmp_path}", f"checkpoint.background={background}"]
    log = kill_again_and_again(command, tmp_path, uninterrupted, kills=20, seed=1)
    print("\n" + "\n".join(log))


@pytest.mark.long
def test_a_run_whose_rank_is_killed_is_started_again_by_itself(train_args, uninterrupted, tmp_path) -> None:
    args = [*train_args, *SETTINGS, f"out={tmp_path / 'run'}", "machine.port=0", "machine.max_restarts=2"]
    line, log = [sys.executable, "-m", "launch", "configs/machines/laptop.yaml", *args], tmp_path / "log"
    process = start(line, log, lambda: list(tmp_path.glob("run/step_*/COMPLETE")))
    children = psutil.Process(process.pid).children(recursive=True)
    random.choice([child for child in children if "-m" in child.cmdline()[:3]]).kill()
    assert process.wait(timeout=200) == 0, log.read_text()[-3000:]
    assert log.read_text().count("started again") == 1
    assert torch.equal(losses(tmp_path / "run"), losses(uninterrupted))


@pytest.mark.parametrize(("name", "to"), [("SIGTERM", "launcher"), ("SIGTERM", "rank"), ("SIGUSR1", "rank")])
def test_a_warning_saves_ends_all_and_costs_nothing(train_args, uninterrupted, tmp_path, name: str, to: str) -> None:
    command, log = [*COMMAND, *train_args, *SETTINGS, f"out={tmp_path}", "checkpoint.every=100"], tmp_path / "log"
    process = start(command, log, (tmp_path / "metrics.jsonl").exists)
    warned = process if to == "launcher" else psutil.Process(process.pid).children()[1]
    warned.send_signal(signal.Signals[name])
    assert process.wait(timeout=120) == (1 if to == "launcher" else 0), log.read_text()[-2000:]
    assert "as asked" in log.read_text() and complete_steps(tmp_path)[0] < "step_0000008"
    done = run(command)
    assert done.returncode == 0 and "resumed from" in done.stdout + done.stderr, done.stderr
    require_equal_bits(tmp_path, uninterrupted)


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_rank_that_hangs_or_dies_is_named_and_the_others_stop(train_args, tmp_path, name: str) -> None:
    settings = [*SETTINGS, "steps=2000", "engine.timeout_s=10", "checkpoint.every=1000", f"out={tmp_path}"]
    log, stacks = tmp_path / "log", tmp_path / "stacks_rank_00000.txt"
    process = start([*COMMAND, *train_args, *settings], log, (tmp_path / "metrics.jsonl").exists)
    victim = psutil.Process(process.pid).children()[1]
    victim.send_signal(signal.Signals[name])
    deadline = time.monotonic() + 60  # six times the limit
    while not stacks.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if name == "SIGSTOP":
        victim.kill()  # the launcher would wait for it
    assert process.wait(timeout=120) == 1
    message = next(line for line in log.read_text().splitlines() if "train run: rank 0 stops" in line)
    assert "missing: rank 1 (silent for" in message and "in step" in message, message
    assert "run_steps" in stacks.read_text()
