"""A batch script: one task per node, saving when Slurm warns, and queued again until the run is at its end."""

import shlex
from collections.abc import Sequence

from launch.command import accelerate_words, environment, shell_line
from launch.machine import MachineConfig
from train.config import STOPPED, TrainConfig


def slurm_script(machine: MachineConfig, config: TrainConfig, words: Sequence[str]) -> str:
    """The text for `sbatch`."""
    slurm = machine.slurm
    options = {
        "job-name": machine.name,
        "nodes": machine.nodes,
        "ntasks-per-node": 1,
        "time": slurm.time,
        "output": f"{slurm.logs}/%x_%j.log",
        "open-mode": "append",
        "gpus-per-node": machine.processes if machine.device == "cuda" else None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "partition": slurm.partition,
        "account": slurm.account,
        "signal": f"USR1@{machine.grace_s}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    container = ["--container-image", slurm.container] if slurm.container else []
    container += ["--container-mounts", slurm.mounts] if slurm.mounts else []
    step = shlex.join(["srun", "--kill-on-bad-exit=1", *container, "bash", "-c"])
    run = accelerate_words(machine, config.engine, words, rank="$SLURM_NODEID", host="$HEAD")
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment(machine).items())
    return f"""#!/bin/bash
{chr(10).join(lines)}
#SBATCH --requeue
# Rendered by: python -m launch; sbatch this file. USR1 comes {machine.grace_s} s before the end of the time: every rank
# finishes its step, the run is saved, and the job goes back into the queue.
set -uo pipefail
mkdir -p {shlex.quote(slurm.logs)}
{exports}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD
{slurm.setup}
# Slurm sends USR1 to all processes of a step: the launcher ignores it, the training processes act on it.
{step} {shlex.quote(shell_line(run))}
status=$?
if [ -e {shlex.quote(f"{config.out}/{STOPPED}")} ] ||
  {{ [ "$status" -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {machine.max_restarts} ]; }}; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
""".replace("\n\n", "\n")
