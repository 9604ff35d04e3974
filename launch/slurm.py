"""A batch script: one task per node; a training run saves when Slurm warns, and is queued again until it is done."""

import math
import shlex

from launch.command import MARK, Task, environment, quoted, shell_line, variable
from launch.machine import MachineConfig
from train.exit import ASKED, ENDED, FAULT


def slurm_script(machine: MachineConfig, task: Task) -> str:
    """The text for `sbatch`."""
    slurm = machine.slurm
    options = {
        "job-name": task.name,
        "nodes": machine.nodes,
        "ntasks-per-node": 1,
        "time": slurm.time if task.out else math.ceil(task.most_s / 60),
        "output": f"{slurm.logs}/%x_%j.log",
        "open-mode": "append",
        "gpus-per-node": machine.processes if machine.device == "cuda" else None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "partition": slurm.partition,
        "account": slurm.account,
        "signal": f"USR1@{machine.grace_s}" if task.out else None,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if task.out else "#SBATCH --no-requeue")
    container = ["--container-image", slurm.container] if slurm.container else []
    container += ["--container-mounts", slurm.mounts] if slurm.mounts else []
    # What sbatch is told of CPUs does not reach the step since Slurm 22.05.
    cpus = [f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []
    # A training run without one of its nodes is none; what runs once is to say what it has found on the others.
    step = " ".join(map(quoted, ["srun", f"--kill-on-bad-exit={int(bool(task.out))}", *cpus, *container, "bash", "-c"]))
    exports = "\n".join(f"export {name}={quoted(value)}" for name, value in environment(machine).items())
    return f"""#!/bin/bash
{chr(10).join(lines)}
{MARK}
# Slurm opens the log first: mkdir -p {quoted(slurm.logs)}, then sbatch this file.
{_SAVING.format(grace_s=machine.grace_s) if task.out else ""}
set -uo pipefail
{exports}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD
{slurm.setup}
{_STAY if task.out else ""}
{_before(slurm.logs) if task.out else ""}
{step} {shlex.quote(shell_line(task.line(variable("SLURM_NODEID"), variable("HEAD"))))}
status=$?
{_again(machine.max_restarts) if task.out else ""}
exit "$status"
""".replace("\n\n", "\n")


_SAVING = """\
# USR1 comes {grace_s} s before the end of the time: every rank finishes its step, the run is saved, and the job goes
# back into the queue. Slurm sends it to all processes of a step: the launcher ignores it, the trainers act on it."""


# At the end of the time Slurm sends TERM to this shell too. If the warning came while the processes were starting, who
# ignore it, they save only now, and the shell must live to put the job back (seen with Slurm 22.05).
_STAY = "trap : TERM"


def _before(logs: str) -> str:
    return f"""\
{ENDED}=$(realpath -m -- {shlex.quote(logs)})/ended_"$SLURM_JOB_ID"
export {ENDED}
rm -f "${ENDED}"  # of the time before: it is to say how this one ends"""


def _again(restarts: int) -> str:
    return f"""\
ended=$(cat "${ENDED}" 2> /dev/null)
rm -f "${ENDED}"
if [ "$ended" = {shlex.quote(ASKED)} ] ||
  {{ [ "$status" -ne 0 ] && [ "$ended" != {FAULT} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; }}; then
  scontrol requeue "$SLURM_JOB_ID"
fi"""
