"""An indexed Job with a headless Service: one pod per node, which find the first by its name."""

import json
import re
import shlex
from typing import Any

from launch.command import MARK, TRAINERS, Task, environment, shell_line, variable
from launch.machine import MachineConfig
from train.exit import ASKED, ENDED, FAULT

PORT = "rendezvous"


def manifests(machine: MachineConfig, task: Task) -> list[dict[str, Any]]:
    """Service and Job. A training pod that ends badly is made anew, and goes on from the run's newest checkpoint; if a
    person has to mend something, the Job fails."""
    kube, labels = machine.kubernetes, {"app": task.name}
    meta = {"name": task.name, "namespace": kube.namespace, "labels": labels}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {
            "clusterIP": "None",
            "selector": labels,
            "publishNotReadyAddresses": True,  # the pods look for each other before any of them is ready
            "ports": [{"name": PORT, "port": machine.port}],
        },
    }
    run = task.line(variable("JOB_COMPLETION_INDEX"), f"{task.name}-0.{task.name}")
    container = {
        "name": "main",
        "image": kube.image,
        "command": [
            "bash",
            "-c",
            _as_it_stands(_GOING_ON.format(run=shell_line(run)) if task.out else shell_line(run)),
        ],
        "env": [{"name": name, "value": _as_it_stands(value)} for name, value in environment(machine).items()],
        "ports": [{"containerPort": machine.port, "name": PORT}],
        "resources": {"limits": _limits(machine), "requests": _limits(machine)},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if task.out:  # the training processes are told first, and save; then the pod ends, within the grace period
        container["lifecycle"] = {"preStop": {"exec": {"command": ["bash", "-c", _WAIT_FOR_SAVE]}}}
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kube.shared_memory}}]
    if kube.volume_claim:
        container["volumeMounts"].append({"name": "data", "mountPath": kube.mount})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": kube.volume_claim}})
    pod = {
        "subdomain": task.name,
        "restartPolicy": "Never",  # the Job makes another pod, if its policy lets it
        "terminationGracePeriodSeconds": machine.grace_s,
        "containers": [container],
        "volumes": volumes,
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "completionMode": "Indexed",
            "completions": machine.nodes,
            "parallelism": machine.nodes,
            # Every pod of a run ends when one crashes, and each is counted.
            "backoffLimit": machine.nodes * machine.max_restarts if task.out else 0,
            **({"podFailurePolicy": {"rules": _RULES}} if task.out else {}),
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return [service, job]


# A pod that ends with 0 counts as done, even if its node was drained: then the run is to go on somewhere else.
_GOING_ON = f"""\
{ENDED}=$(mktemp); export {ENDED}
({{run}})
status=$?
case "$(cat "${ENDED}")" in {shlex.quote(ASKED)}) exit 75 ;; {FAULT}) exit 2 ;; *) exit "$status" ;; esac"""
_RULES = [
    {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [2]}},
    {"action": "Ignore", "onExitCodes": {"containerName": "main", "operator": "In", "values": [75]}},  # all have saved
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},  # drained, not counted
]
_WAIT_FOR_SAVE = f"pkill -USR1 -f '{TRAINERS}'; while pgrep -f '{TRAINERS}' > /dev/null; do sleep 1; done"


def _as_it_stands(text: str) -> str:
    """For a container's command and env, in which Kubernetes puts values for `$(NAME)` and `$` for `$$`."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _limits(machine: MachineConfig) -> dict[str, str]:
    kube = machine.kubernetes
    gpus = {kube.gpu_resource: str(machine.processes)} if machine.device == "cuda" else {}
    return gpus | {name: value for name, value in (("cpu", kube.cpu), ("memory", kube.memory)) if value}


def kubernetes_text(machine: MachineConfig, task: Task) -> str:
    """For `kubectl create -f`: documents of JSON, which is YAML too and quotes every text."""
    documents = (json.dumps(one, indent=2, ensure_ascii=False) for one in manifests(machine, task))
    return f"{MARK}\n" + "\n---\n".join(documents) + "\n"
