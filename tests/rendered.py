"""What `launch` renders for schedulers, checked as text and run with programs that stand for the real ones."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate

NODE_3 = {"SLURM_NODEID": "3", "HEAD": "node17"}


def require_valid_script(text: str, path: Path) -> None:
    """Writes a Slurm script to `path`, which bash and shellcheck accept."""
    path.write_text(text)
    for check in (["bash", "-n"], ["shellcheck", "--severity=warning"]):
        done = subprocess.run([*check, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def require_valid_manifests(service: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The pod of the job; Kubernetes' schemas accept both."""
    for manifest in (service, job):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    return job["spec"]["template"]["spec"]


def step_of(script: str) -> tuple[list[str], list[str]]:
    """The options of the step of a Slurm script, and what node 3 runs after `python -m launch`."""
    *options, line = shlex.split(next(line for line in script.splitlines() if line.startswith("srun ")))
    shown = ["bash", "-c", line.replace("exec python -m launch", "printf '%s\\n'")]
    done = subprocess.run(shown, capture_output=True, text=True, check=True, env=NODE_3)
    return options, done.stdout.splitlines()


def write_programs(folder: Path, **programs: str) -> None:
    """Shell scripts that stand for programs of these names."""
    folder.mkdir(exist_ok=True)
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def run_container(container: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the container's command with the programs of `folder`, as Kubernetes substitutes `$(NAME)` and `$$`."""
    env = {variable["name"]: variable["value"] for variable in container["env"]}

    def substitute(text: str) -> str:
        return re.sub(r"\$(\$|\((.*?)\))", lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), text)

    env = {name: substitute(value) for name, value in env.items()}
    env |= {"PATH": f"{folder}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "1"}
    command = [substitute(word) for word in container["command"]]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
