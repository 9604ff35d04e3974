"""A batch script: one task per node; a training run saves when Slurm warns, and is queued again until it is done."""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from configs import within
from configs.errors import UserError
from configs.storage import is_s3
from launch.scheduler import MARK, Cluster, Job, Scheduler, Shell, quoted, shell_line
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

    def submit(self, cluster: Cluster, job: Job, script: str) -> int:
        Path(self.logs).mkdir(parents=True, exist_ok=True)  # Slurm opens the log before the script runs
        return super().submit(cluster, job, script)

    def render(self, cluster: Cluster, job: Job) -> str:
        self._require_mounts(job)
        exports = [f"export {name}={quoted(value)}" for name, value in cluster.environment.items()]
        line = shell_line(job.line(Shell('"$SLURM_NODEID"'), Shell('"$HEAD"')))
        before = [_BEFORE.format(grace_s=cluster.grace_s, logs=quoted(self.logs))] if job.saves_to else []
        lines = [
            "#!/bin/bash",
            *self._options(cluster, job),
            MARK,
            f"# Slurm opens the log first: mkdir -p {quoted(self.logs)}, then sbatch this file.",
            "set -uo pipefail",
            *exports,
            'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export HEAD",
            self.setup,
            *before,
            f"{self._step(job)} {shlex.quote(line)}",
            "status=$?",
            *([_AFTER % cluster.max_restarts] if job.saves_to else []),
            'exit "$status"',
        ]
        return "\n".join([*filter(None, lines), ""])

    def _require_mounts(self, job: Job) -> None:
        """UserError if what a run in a container writes would end with the container."""
        if not (self.container and job.saves_to):
            return
        mounts = [mount.split(":") for mount in (self.mounts or "").split(",") if mount.startswith("/")]
        same_inside = [mount[0] for mount in mounts if len(mount) == 1 or mount[0] == mount[1]]
        for name, path in {"out": job.saves_to, "machine.slurm.logs": self.logs}.items():
            if not is_s3(path) and not any(Path(path).is_relative_to(mount) for mount in same_inside):
                raise UserError(
                    f"{name}={path} ends with its container: give an absolute path under one of "
                    "machine.slurm.mounts=/path:/path, with the same path inside and outside"
                )

    def _options(self, cluster: Cluster, job: Job) -> list[str]:
        time = self.time if job.saves_to else math.ceil(job.limit_s / 60)
        options: dict[str, object] = {"job-name": job.name, "nodes": cluster.nodes, "ntasks-per-node": 1, "time": time}
        options |= {"output": f"{self.logs}/%x_%j.log", "open-mode": "append", "cpus-per-task": self.cpus_per_task}
        options |= {"mem": self.memory, "partition": self.partition, "account": self.account}
        options |= {"gpus-per-node": cluster.processes} if cluster.device == "cuda" else {}
        options |= {"signal": f"USR1@{cluster.grace_s}"} if job.saves_to else {}
        for name, value in options.items():
            if not re.fullmatch(r"[^\s\"'\\#]+", str(value)):  # sbatch reads these lines itself
                raise UserError(f"machine.slurm: --{name}={value!r} may hold no white space, quotes, \\ or #")
        lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
        return [*lines, "#SBATCH --requeue" if job.saves_to else "#SBATCH --no-requeue"]

    def _step(self, job: Job) -> str:
        # A run without one of its nodes cannot go on; what runs once is to say what it has found on the others.
        args = ["srun", f"--kill-on-bad-exit={int(job.saves_to is not None)}"]
        # What sbatch is told of CPUs does not reach the step since Slurm 22.05.
        args += [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []
        args += ["--container-image", self.container] if self.container else []
        args += ["--container-mounts", self.mounts] if self.mounts else []
        return shlex.join([*args, "bash", "-c"])


_BEFORE = f"""\
# USR1 comes {{grace_s}} s before the end of the time: every rank finishes its step, the run is saved, and the job goes
# back into the queue. Slurm sends it to all processes of a step: the launcher ignores it, the trainers act on it.
# At the end of the time Slurm sends TERM to this shell too, which must live to put the job back into the queue, even if
# the warning came while the processes were starting and they save only now (seen with Slurm 22.05).
trap : TERM
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
