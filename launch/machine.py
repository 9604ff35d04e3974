"""What a run is put on: one machine or many, by hand, through Slurm or Kubernetes."""

import re
import unicodedata
from dataclasses import dataclass, field, fields
from typing import Literal

from configs.errors import UserError


def is_text(value: str) -> bool:
    """Whether `value` is UTF-8 without control characters but tabs and line ends: what scripts and manifests hold."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\t\n" for c in value)


def require_word(name: str, value: str | None, characters: str = r"[^\s\"'\\#]") -> None:
    """Raises ValueError if the setting `name` is given and is not one plain word, as an option of a scheduler is."""
    if value is not None and not (re.fullmatch(f"(?!-){characters}+", value) and value.isprintable()):
        least = "letters, digits, _ . and -" if "w" in characters else "no white space, quotes, \\ or #"
        raise UserError(f"{name}={value!r} must be one word that does not begin with - ({least})")


# 65535 s is what Slurm takes at most as the time of a signal.
BOUNDS = {"nodes": (1, 100_000), "processes": (1, 1024), "grace_s": (1, 65_535), "max_restarts": (0, 10_000)}


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

    def __post_init__(self) -> None:
        for name in ("time", "partition", "account", "memory", "logs"):  # sbatch reads their lines itself
            require_word(f"machine.slurm.{name}", getattr(self, name))
        if not is_text(self.setup):
            raise UserError(f"machine.slurm.setup={self.setup!r} holds control characters; leave them out")
        if self.cpus_per_task is not None and not 1 <= self.cpus_per_task <= 65_535:
            raise UserError(f"machine.slurm.cpus_per_task={self.cpus_per_task} must be 1 or more and at most 65535")


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

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.name != "mount":
                require_word(f"machine.kubernetes.{one.name}", getattr(self, one.name))
        if not self.mount.startswith("/") or ":" in self.mount or not is_text(self.mount):
            raise UserError(f"machine.kubernetes.mount={self.mount!r} must be an absolute path without :")


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
    port: int = 29500  # 0: a free one, for a run on one machine
    grace_s: int = 180  # from the warning to the end: for the step, and for saving
    max_restarts: int = 0  # after a crash; a Slurm job counts what it was queued again for any reason
    env: dict[str, str] = field(default_factory=dict)
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    def __post_init__(self) -> None:
        require_word("machine.name", self.name, r"[\w.-]")  # part of a log's name too
        require_word("machine.host", self.host, r"[\w.:%-]")
        for name, value in self.env.items():
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(f"machine.env: {name!r} is no variable's name; use letters, digits and _")
            if not is_text(value):
                raise UserError(f"machine.env.{name}={value!r} holds control characters; leave them out")
        if not (self.port == 0 and self.kind == "local" and self.nodes == 1) and not 1 <= self.port <= 65535:
            raise UserError(f"machine.port={self.port} must be 1 to 65535 (0, a free one, is for one machine)")
        if self.kind == "kubernetes" and not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"machine.name={self.name}: Kubernetes takes up to 40 lower-case letters, digits and -, a letter first"
            )
        for name, (least, most) in BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                raise UserError(f"machine.{name}={getattr(self, name)} must be {least} or more and at most {most}")
        if not 0 <= self.node_rank < self.nodes:
            raise UserError(f"machine.node_rank={self.node_rank} must be 0 or more and below nodes={self.nodes}")
        if self.kind == "local" and self.nodes > 1 and self.host in ("127.0.0.1", "localhost"):
            raise UserError("machine.nodes > 1 needs machine.host=<name of node 0>, the same on all nodes")

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes
