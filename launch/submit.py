"""A task on a cluster: written down for its scheduler, and handed over."""

import os
import shlex
import subprocess
from pathlib import Path

from configs.errors import FileInTheWayError, MissingFileError, UserError
from configs.files import write_text
from configs.storage import is_s3
from launch.command import MARK, Task
from launch.kubernetes import kubernetes_text
from launch.machine import MachineConfig
from launch.slurm import slurm_script


def require_own(path: str, mark: str) -> None:
    """Raises ValueError for a bucket, FileExistsError for what may not be written over: something at `path` that is not
    empty, and no line of whose first megabyte begins with `mark`."""
    place = Path(path)
    if is_s3(path):
        raise UserError(f"{path}: this is only written to a folder of this machine, not to a bucket")
    if not os.path.lexists(path):
        return
    if place.is_file():
        with place.open("rb") as file:
            beginning = file.read(1 << 20)
        if not beginning or any(line.startswith(mark.encode()) for line in beginning.split(b"\n")):
            return
    raise FileInTheWayError(f"{path} is there and was not written by this command; move it, or name another file")


def submit(machine: MachineConfig, task: Task, script: str | None, dry_run: bool) -> int:
    """Writes the Slurm script or the Kubernetes manifests to `script` and submits that; without `script`, or with
    `dry_run`, prints them."""
    text = (slurm_script if machine.kind == "slurm" else kubernetes_text)(machine, task)
    if script is None or dry_run:
        print(text, end="")
        return 0
    require_own(script, MARK)
    script = f"./{script}" if script.startswith("-") else script  # else it were an option
    write_text(script, text)
    if machine.kind == "slurm":
        Path(machine.slurm.logs).mkdir(parents=True, exist_ok=True)  # Slurm opens the log before the script runs
    command = {"slurm": ["sbatch"], "kubernetes": ["kubectl", "create", "-f"]}[machine.kind]
    print(shlex.join([*command, script]))
    try:
        status = subprocess.call([*command, script])
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{script} is written, but there is no {command[0]} on this machine; submit it where there is one"
        ) from error
    if status and machine.kind == "kubernetes":  # a Job cannot be changed, and one of the same name may be there
        raise UserError(f"{script} was not taken; what is left of an earlier one goes by kubectl delete -f {script}")
    return status
