"""What a run is put on: one machine or many, by hand, through Slurm or Kubernetes."""

import re
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SlurmConfig:
    """What `sbatch` is told besides nodes and GPUs."""

    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    cpus_per_task: int | None = None
    memory: str | None = None  # per node, as 200G
    logs: str = "logs"  # folder
    setup: str = ""  # a line of shell before the run, as `source .venv/bin/activate`
    container: str | None = None  # an image for pyxis' --container-image
    mounts: str | None = None  # for --container-mounts


@dataclass(frozen=True)
class KubernetesConfig:
    """What the Job is told besides nodes and GPUs."""

    image: str = "worldloom:latest"
    namespace: str = "default"
    gpu_resource: str = "nvidia.com/gpu"
    volume_claim: str | None = None  # a shared PersistentVolumeClaim, mounted at `mount`
    mount: str = "/data"
    shared_memory: str = "16Gi"
    cpu: str | None = None
    memory: str | None = None


@dataclass(frozen=True)
class MachineConfig:
    """`machine:` of configs/machines/*.yaml."""

    kind: Literal["local", "slurm", "kubernetes"] = "local"
    name: str = "worldloom"  # of the job
    nodes: int = 1
    processes: int = 1  # per node: its GPUs, or as many processes on its CPU
    device: Literal["cpu", "cuda"] = "cuda"
    node_rank: int = 0  # local: which of `nodes` this is
    host: str = "127.0.0.1"  # local: where node 0 is reached; Slurm and Kubernetes find it
    port: int = 29500
    grace_s: int = 180  # from the warning to the end: for the step, and for saving
    max_restarts: int = 0  # after a crash; a Slurm job counts what it was queued again for any reason
    env: dict[str, str] = field(default_factory=dict)
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    def __post_init__(self) -> None:
        if self.kind == "kubernetes" and not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise ValueError(
                f"machine.name={self.name}: Kubernetes takes up to 40 lower-case letters, digits and -, a letter first"
            )
        least = min(self.nodes, self.processes, self.grace_s, self.max_restarts + 1)
        if least < 1 or not 0 <= self.node_rank < self.nodes:
            raise ValueError(
                f"machine: nodes {self.nodes}, processes {self.processes} and grace_s {self.grace_s} must be 1 or "
                f"more, max_restarts {self.max_restarts} 0 or more, node_rank {self.node_rank} below nodes"
            )
        if self.kind == "local" and self.nodes > 1 and self.host in ("127.0.0.1", "localhost"):
            raise ValueError("machine.nodes > 1 needs machine.host=<name of node 0>, the same on all nodes")

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes
