"""An indexed Job with a headless Service: one pod per node, which find the first by its name."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.storage import is_s3
from launch.scheduler import MARK, TRAINERS, Cluster, Job, Scheduler, Shell, shell_line
from train.exit import ASKED, ENDED, FAULT


@dataclass(frozen=True)
class Kubernetes(Scheduler):
    """`machine.kubernetes`: what the Job is told besides nodes and GPUs."""

    image: str = "worldloom:latest"
    namespace: str = "default"
    volume_claim: str | None = None  # a shared PersistentVolumeClaim, mounted at `mount`
    mount: str = "/data"
    shared_memory: str = "16Gi"
    memory: str | None = None

    command = ("kubectl", "create", "-f")

    def render(self, cluster: Cluster, job: Job) -> str:
        """Documents of JSON, which is YAML too and quotes every text."""
        if not re.fullmatch("[a-z]([-a-z0-9]{0,46}[a-z0-9])?", job.name) or not cluster.port:
            raise UserError(
                f"machine.name={cluster.name}: Kubernetes takes up to 40 lower-case letters, digits and -, a letter "
                "first, and machine.port must not be 0"
            )
        out = job.saves_to
        if out and not is_s3(out) and not (self.volume_claim and Path(out).is_relative_to(self.mount)):
            raise UserError(
                f"out={out} ends with its pod: give an s3:// url, or a folder under {self.mount} with "
                "machine.kubernetes.volume_claim="
            )
        documents = [json.dumps(document, indent=2, ensure_ascii=False) for document in self.manifests(cluster, job)]
        return f"{MARK}\n" + "\n---\n".join(documents) + "\n"

    def manifests(self, cluster: Cluster, job: Job) -> list[dict[str, Any]]:
        """Service and Job. A training pod that ends badly is made again, and goes on from the run's newest checkpoint;
        if a person has to fix something, the Job fails."""
        labels = {"app": job.name}
        meta = {"name": job.name, "namespace": self.namespace, "labels": labels}
        service = {
            "clusterIP": "None",
            "selector": labels,
            "publishNotReadyAddresses": True,  # the pods look for each other before any of them is ready
            "ports": [{"port": cluster.port}],
        }
        shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shared_memory}}
        data = {"name": "data", "persistentVolumeClaim": {"claimName": self.volume_claim}}
        pod = {
            "subdomain": job.name,
            "restartPolicy": "Never",  # the Job makes another pod, if its policy lets it
            "terminationGracePeriodSeconds": cluster.grace_s,
            "containers": [self._container(cluster, job)],
            "volumes": [shm, data] if self.volume_claim else [shm],
        }
        spec = {"completionMode": "Indexed", "completions": cluster.nodes, "parallelism": cluster.nodes}
        spec |= {"backoffLimit": 0, "template": {"metadata": {"labels": labels}, "spec": pod}}
        if job.saves_to:  # every pod of a run ends when one crashes, and each is counted
            spec |= {"backoffLimit": cluster.nodes * cluster.max_restarts, "podFailurePolicy": {"rules": _RULES}}
        return [
            {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service},
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec},
        ]

    def _container(self, cluster: Cluster, job: Job) -> dict[str, Any]:
        line = shell_line(job.line(Shell('"$JOB_COMPLETION_INDEX"'), f"{job.name}-0.{job.name}"))
        limits = {"nvidia.com/gpu": str(cluster.processes)} if cluster.device == "cuda" else {}
        limits |= {"memory": self.memory} if self.memory else {}
        mounts = {"shm": "/dev/shm"} | ({"data": self.mount} if self.volume_claim else {})
        # The training processes are told to stop first, and save; then the pod ends, within the grace period.
        stopping = {"preStop": {"exec": {"command": ["bash", "-c", _WAIT_FOR_SAVE]}}}
        return {
            "name": "main",
            "image": self.image,
            "command": ["bash", "-c", _escape(_REPORTING.format(run=line) if job.saves_to else line)],
            "env": [{"name": name, "value": _escape(value)} for name, value in cluster.environment.items()],
            "resources": {"limits": limits, "requests": limits},
            "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
            **({"lifecycle": stopping} if job.saves_to else {}),
        }


def _escape(text: str) -> str:
    """For a container's command and env, in which Kubernetes puts values for `$(NAME)` and `$` for `$$`."""
    return re.sub(r"\$(?=[$(])", "$$", text)


# A pod that ends with 0 counts as done, even if its node was drained: then the run is to go on somewhere else.
_REPORTING = f"""\
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
