"""A job, the cluster that it runs on, and what all schedulers share. Each kind of scheduler has its own file."""

import os
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from configs import within
from configs.errors import FileInTheWayError, MissingFileError, UserError
from configs.storage import is_s3, write_text

MARK = "# Rendered by: python -m launch"  # in every file that is written for a scheduler
TRAINERS = "^[^ ]*python[^ ]* (-[a-z]+ )*-m train"  # how their lines begin; their launcher's ends like theirs


class Shell(str):
    """Text that is shell already. Every other text is quoted when a line of shell is made of it."""


def quoted(arg: str) -> Shell:
    """`arg` as shell; UserError for one that no script can hold."""
    if isinstance(arg, Shell):
        return arg
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\t\n" for c in arg):
        raise UserError(f"{arg!r} holds characters that a script cannot; rename the file or change the value")
    return Shell(shlex.quote(arg))


def shell_line(args: Sequence[str]) -> str:
    """The arguments as a line of shell, which becomes the launcher.

    The launcher ignores USR1, so that a warning which every process gets reaches those that can save.
    """
    return f"trap '' USR1; exec {' '.join(map(quoted, args))}"


@dataclass(frozen=True)
class Cluster:
    """Nodes and the processes on them, whichever scheduler starts these."""

    name: str = "worldloom"  # of the job
    nodes: int = within(1, 100_000, 1)
    processes: int = within(1, 1024, 1)  # per node: its GPUs, or as many processes on its CPU
    device: Literal["cpu", "cuda"] = "cuda"
    node_rank: int = 0  # local: which of `nodes` this is
    host: str = "127.0.0.1"  # local: where node 0 is reached; Slurm and Kubernetes find it
    port: int = within(0, 65_535, 29500)  # 0: a free one, for a run on one node
    # From the warning to the end: for the step, and for saving. Slurm takes at most 65535 s.
    grace_s: int = within(1, 65_535, 180)
    max_restarts: int = within(0, 10_000, 0)  # after a crash; a Slurm job counts every time that it was queued again
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):  # part of a log's name too
            raise UserError(f"machine.name={self.name!r} must be one word of letters, digits, _ . and -")
        for name, value in self.env.items():
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(f"machine.env: {name!r} is no variable's name; use letters, digits and _")
            quoted(value)  # UserError for one that no script can hold
        if self.port == 0 and self.nodes > 1:
            raise UserError("machine.port=0, a free one, is for one node; give all nodes the same number")
        if not 0 <= self.node_rank < self.nodes:
            raise UserError(f"machine.node_rank={self.node_rank} must be 0 or more and below nodes={self.nodes}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes

    @property
    def environment(self) -> dict[str, str]:
        """Of every process."""
        # A machine with GPUs that is to use its CPU must not see them: torch would take them.
        cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        cpu |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
        return {**(cpu if self.device == "cpu" else {}), "TOKENIZERS_PARALLELISM": "false", **self.env}


@dataclass(frozen=True)
class Job:
    """What is to run on every node."""

    name: str
    line: Callable[[str | None, str | None], list[str]]  # a node's command, of its rank and the host of node 0
    saves_to: str | None = None  # of a run, which is queued again when it was stopped; none: the job runs once
    limit_s: float = 0.0  # the longest that a job which runs once takes


class Scheduler:
    """A kind of scheduler; a frozen dataclass of its settings."""

    command: ClassVar[Sequence[str]] = ()  # submits the file whose name follows

    def render(self, cluster: Cluster, job: Job) -> str:
        """The script or manifests of the job; UserError for a job that cannot run there."""
        raise NotImplementedError

    def submit(self, cluster: Cluster, job: Job, script: str) -> int:
        """Writes what `render` makes to the file `script` and submits that; the exit status."""
        require_own(script, MARK)
        write_text(script, self.render(cluster, job))
        command = [*self.command, os.path.abspath(script)]  # a name may look like an option
        print(shlex.join(command))
        try:
            return subprocess.call(command)
        except FileNotFoundError as error:
            raise MissingFileError(
                f"{script} is written, but there is no {self.command[0]} on this machine; submit it where there is one"
            ) from error


def require_own(path: str, mark: str) -> None:
    """Raises an error if `path` is in a bucket, or something is there that is no file with `mark` in it."""
    if is_s3(path):
        raise UserError(f"{path}: this is only written to a folder of this machine, not to a bucket")
    if os.path.lexists(path) and not (Path(path).is_file() and mark.encode() in Path(path).read_bytes()):
        raise FileInTheWayError(f"{path} is there and was not written by this command; move it, or name another file")
