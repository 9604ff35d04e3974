"""One run from the command line: checked first, then started here or written down for a scheduler."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil

from configs import build, flat
from configs.errors import MissingFileError, UserError
from configs.overrides import is_setting, merge_words
from configs.storage import is_s3
from launch.command import TRAINERS, Task, accelerate_words, environment
from launch.machine import MachineConfig
from launch.submit import submit
from train.config import TrainConfig
from train.exit import ENDED, FAULT


@dataclass(frozen=True)
class Own:
    """What the training program does not get."""

    machine: MachineConfig
    dry_run: bool = False  # only print
    script: str | None = None  # file for the Slurm script or the Kubernetes manifests; none: they are printed


OWN = tuple(one.name for one in fields(Own))


@dataclass(frozen=True)
class Launch:
    """What `python -m launch` was told."""

    machine: MachineConfig
    train: TrainConfig
    words: tuple[str, ...]  # those that the training program gets
    dry_run: bool = False
    script: str | None = None


def read_launch(words: Sequence[str]) -> Launch:
    """Splits the words into the machine's and the run's. What a machine's file says of the run counts more than the
    run's own files, and less than the words after them. Raises ValueError in one line."""
    words = sorted(words, key=lambda word: 2 if is_setting(word) else int("machine" in merge_words([word], False)))
    merged = merge_words(words)
    if "machine" not in merged:
        raise UserError("no machine: begin with a file of configs/machines")
    own = build(Own, {name: merged.pop(name) for name in OWN if name in merged})
    mine = tuple(part for word in words for part in _of_training(word))
    return Launch(own.machine, build(TrainConfig, merged), mine, own.dry_run, own.script)


def _of_training(word: str) -> list[str]:
    """What the training program is told of a word: not the launch's own, nor a machine's file but for its settings."""
    if is_setting(word):
        return [] if word.partition("=")[0].partition(".")[0] in OWN else [word]
    held = merge_words([word], resolve=False)  # a value may refer to another file's
    if "machine" not in held:
        return [word]
    others = flat({key: value for key, value in held.items() if key not in OWN})
    return [_setting(name, value) for name, value in others.items()]


def _setting(name: str, value: Any) -> str:
    """`name=value` that is read as just that."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def launch(words: list[str]) -> int:
    """Start a run, or write it down for a scheduler: configs/machines/X.yaml configs/train/Y.yaml ... dry_run=true"""
    given = read_launch(words)
    from train.check import check_run  # torch takes a second, and a mistyped word should not

    machine = given.machine
    try:
        check_run(given.train, machine.ranks)
    except FileNotFoundError as error:
        kube = machine.kubernetes
        if machine.kind != "kubernetes" or not kube.volume_claim or Path(kube.mount).is_dir():
            raise
        raise MissingFileError(
            f"{error} (this machine has no {kube.mount}, where the pods' volume is: start the run where it is mounted, "
            "or use s3:// urls)"
        ) from error
    if machine.kind == "local":
        line = accelerate_words(machine, given.train.engine, given.words)
        env = environment(machine)
        print(*(f"{name}={shlex.quote(value)}" for name, value in env.items()), shlex.join(line), flush=True)
        return (
            0 if given.dry_run else supervise([sys.executable, *line[1:]], {**os.environ, **env}, machine.max_restarts)
        )
    return submit(machine, train_task(given), given.script, given.dry_run)


def train_task(given: Launch) -> Task:
    """The run, for a scheduler. Raises ValueError in one line if what it writes would go with a pod or container."""
    kube, run = given.machine.kubernetes, given.train.checkpoints
    kept = is_s3(run) or (kube.volume_claim is not None and Path(run).is_relative_to(kube.mount))
    if given.machine.kind == "kubernetes" and not kept:
        where = f"under {kube.mount}" if kube.volume_claim else "there after machine.kubernetes.volume_claim= is given"
        raise UserError(f"out={run} ends with its pod: a place that stays is {where}, or an s3:// url")
    slurm = given.machine.slurm
    if given.machine.kind == "slurm" and slurm.container:
        for name, place in (("out", run), ("machine.slurm.logs", slurm.logs)):
            if not is_s3(place) and not any(Path(place).is_relative_to(mount) for mount in _same_inside(slurm.mounts)):
                raise UserError(
                    f"{name}={place} ends with its container: give an absolute path under one of "
                    "machine.slurm.mounts=/path:/path, with the same path inside and outside"
                )
    line = partial(accelerate_words, given.machine, given.train.engine, given.words)
    return Task(given.machine.name, line, out=given.train.out)


def _same_inside(mounts: str | None) -> list[str]:
    """Those of `--container-mounts` that have their own path in the container too."""
    places = [mount.split(":") for mount in (mounts or "").split(",") if mount]
    return [place[0] for place in places if place[0].startswith("/") and place[:2] in (place[:1], place[:1] * 2)]


def supervise(line: Sequence[str], env: dict[str, str], restarts: int) -> int:
    """The exit status of a run that is started again, at most `restarts` times, when it crashes: it goes on from its
    newest checkpoint. Not when it ends well, was given something wrong (2), was interrupted (130) or asked to stop."""
    for left in reversed(range(restarts + 1)):
        with TemporaryDirectory() as folder:
            ended = Path(folder, "ended")
            process = subprocess.Popen(line, env={**env, ENDED: str(ended)})
            with passing_on(process) as asked:
                try:
                    status = process.wait()
                except KeyboardInterrupt:
                    process.wait()  # it got the same Ctrl-C, and saves
                    status = 130
            if ended.exists() and ended.read_text() == FAULT:
                status = 2
        if status in (0, 2, 130) or not left or asked:
            break
        print(f"launch: ended with status {status}; started again, {left - 1} more times if need be", flush=True)
    return status


@contextmanager
def passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGUSR1 reach the training processes, which save, and not their launcher, which
    would kill them after half a minute. Gives the signals that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        trainers = [one for one in psutil.Process(process.pid).children(recursive=True) if _is_trainer(one)]
        for one in trainers:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGUSR1)
        if not trainers:
            process.terminate()  # it has not come that far

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_trainer(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return re.match(TRAINERS, " ".join(process.cmdline())) is not None
    return False
