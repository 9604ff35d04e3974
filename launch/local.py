"""This machine: a run is started at once, started again when it crashes, and saved when it is asked to stop."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import psutil

from configs.errors import UserError
from launch.scheduler import TRAINERS, Cluster, Job, Scheduler
from train.exit import ENDED, FAULT


@dataclass(frozen=True)
class Local(Scheduler):
    """This machine, which is told its number if it is one of several."""

    def render(self, cluster: Cluster, job: Job) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
        return " ".join([*variables, shlex.join(job.line(None, None))]) + "\n"

    def submit(self, cluster: Cluster, job: Job, script: str) -> int:
        if script:
            raise UserError(f"script={script} is for machine.kind=slurm and kubernetes; leave it out")
        print(self.render(cluster, job), end="", flush=True)
        line = [sys.executable, *job.line(None, None)[1:]]
        return supervise(line, {**os.environ, **cluster.environment}, cluster.max_restarts)


def supervise(line: Sequence[str], env: dict[str, str], restarts: int) -> int:
    """The exit status of a run that is started again, at most `restarts` times, when it crashes: it goes on from its
    newest checkpoint. Not when it ends well, has an error of the user's (2), was interrupted (130) or asked to stop."""
    for left in reversed(range(restarts + 1)):
        with TemporaryDirectory() as folder:
            ended = Path(folder, "ended")
            process = subprocess.Popen(line, env={**env, ENDED: str(ended)})
            with passing_on(process) as signals:
                status = wait(process)
            if ended.exists() and ended.read_text() == FAULT:
                status = 2
        if status in (0, 2, 130) or not left or signals:
            break
        print(f"launch: ended with status {status}; started again, {left - 1} more times if need be", flush=True)
    return status


def wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status; 130 after Ctrl-C, which `process` got too and acts on first."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return 130


@contextmanager
def passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGUSR1 reach the training processes, which save, and not their launcher, which
    would kill them after half a minute. Gives the signals that came."""
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        trainers = [child for child in psutil.Process(process.pid).children(recursive=True) if _is_trainer(child)]
        for trainer in trainers:
            with suppress(psutil.NoSuchProcess):
                trainer.send_signal(signal.SIGUSR1)
        if not trainers:
            process.terminate()  # it has not come that far

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_trainer(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return re.match(TRAINERS, " ".join(process.cmdline())) is not None
    return False
