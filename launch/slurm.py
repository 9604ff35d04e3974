"""A batch script: one task per node; a training run saves when Slurm warns, and is queued again until it is done."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from configs import within
from configs.errors import UserError
from configs.storage import is_s3
from launch.scheduler import (
    MARK,
    Cluster,
    Job,
    Scheduler,
    is_text,
    quoted,
    require_own,
    require_word,
    shell_line,
    variable,
)  # fmt: skip
from train.exit import ASKED, ENDED, FAULT


@dataclass(frozen=True)
class Slurm(Scheduler):
    """`machine.slurm`: what `sbatch` is told besides nodes and GPUs."""

    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    cpus_per_task: int | None = within(1, 65_535, None)
    memory: str | None = None  # per node, as 200G
    logs: str = "logs"  # folder
    setup: str = ""  # a line of shell before the run, as `source .venv/bin/activate`
    container: str | None = None  # an image for pyxis' --container-image
    mounts: str | None = None  # for --container-mounts

    command = ("sbatch",)

    def __post_init__(self) -> None:
        for name in ("time", "partition", "account", "memory", "logs"):  # sbatch reads their lines itself
            require_word(f"machine.slurm.{name}", getattr(self, name))
        if not is_text(self.setup):
            raise UserError(f"machine.slurm.setup={self.setup!r} holds control characters; leave them out")

    def check(self, cluster: Cluster, job: Job) -> None:
        mounts = [mount.split(":") for mount in (self.mounts or "").split(",") if mount.startswith("/")]
        same_inside = [mount[0] for mount in mounts if len(mount) == 1 or mount[0] == mount[1]]
        written = {"out": job.saves_to, "machine.slurm.logs": self.logs} if self.container and job.saves_to else {}
        for name, path in written.items():
            if path and not is_s3(path) and not any(Path(path).is_relative_to(mount) for mount in same_inside):
                raise UserError(
                    f"{name}={path} ends with its container: give an absolute path under one of "
                    "machine.slurm.mounts=/path:/path, with the same path inside and outside"
                )

    def submit(self, cluster: Cluster, job: Job, script: str | None) -> int:
        if script is not None:
            require_own(script, MARK)
            Path(self.logs).mkdir(parents=True, exist_ok=True)  # Slurm opens the log before the script runs
        return super().submit(cluster, job, script)

    def render(self, cluster: Cluster, job: Job) -> str:
        exports = [f"export {name}={quoted(value)}" for name, value in cluster.environment.items()]
        line = shell_line(job.line(variable("SLURM_NODEID"), variable("HEAD")))
        lines = ["#!/bin/bash", *self._options(cluster, job), MARK]
        lines += [f"# Slurm opens the log first: mkdir -p {quoted(self.logs)}, then sbatch this file."]
        lines += [_SAVING.format(grace_s=cluster.grace_s)] if job.saves_to else []
        lines += ["set -uo pipefail", *exports]
        lines += ['HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "export HEAD"]
        lines += [self.setup] if self.setup else []
        lines += ["trap : TERM", _BEFORE.format(logs=shlex.quote(self.logs))] if job.saves_to else []
        lines += [f"{self._step(job)} {shlex.quote(line)}", "status=$?"]
        lines += [_AFTER % cluster.max_restarts] if job.saves_to else []
        return "\n".join([*lines, 'exit "$status"', ""])

    def _options(self, cluster: Cluster, job: Job) -> list[str]:
        time = self.time if job.saves_to else math.ceil(job.limit_s / 60)
        options: dict[str, object] = {"job-name": job.name, "nodes": cluster.nodes, "ntasks-per-node": 1, "time": time}
        options |= {"output": f"{self.logs}/%x_%j.log", "open-mode": "append", "cpus-per-task": self.cpus_per_task}
        options |= {"mem": self.memory, "partition": self.partition, "account": self.account}
        options |= {"gpus-per-node": cluster.processes} if cluster.device == "cuda" else {}
        options |= {"signal": f"USR1@{cluster.grace_s}"} if job.saves_to else {}
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
        return [*lines, "#SBATCH --requeue" if job.saves_to else "#SBATCH --no-requeue"]

    def _step(self, job: Job) -> str:
        # A run without one of its nodes cannot go on; what runs once is to say what it has found on the others.
        words = ["srun", f"--kill-on-bad-exit={int(job.saves_to is not None)}"]
        # What sbatch is told of CPUs does not reach the step since Slurm 22.05.
        words += [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []
        words += ["--container-image", self.container] if self.container else []
        words += ["--container-mounts", self.mounts] if self.mounts else []
        return " ".join(map(quoted, [*words, "bash", "-c"]))


_SAVING = """\
# USR1 comes {grace_s} s before the end of the time: every rank finishes its step, the run is saved, and the job goes
# back into the queue. Slurm sends it to all processes of a step: the launcher ignores it, the trainers act on it.
# At the end of the time Slurm sends TERM to this shell too, which must live to put the job back into the queue, even if
# the warning came while the processes were starting and they save only now (seen with Slurm 22.05)."""
_BEFORE = f"""\
{ENDED}=$(realpath -m -- {{logs}})/ended_"$SLURM_JOB_ID"
export {ENDED}
rm -f "${ENDED}"  # of the time before: it is to say how this one ends"""
_AFTER = f"""\
ended=$(cat "${ENDED}" 2> /dev/null)
rm -f "${ENDED}"
if [ "$ended" = {shlex.quote(ASKED)} ] ||
  {{ [ "$status" -ne 0 ] && [ "$ended" != {FAULT} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt %d ]; }}; then
  scontrol requeue "$SLURM_JOB_ID"
fi"""
