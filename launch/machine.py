"""What a run is put on: one machine or many, by hand, through Slurm or Kubernetes."""

from dataclasses import dataclass, field

from configs.errors import UserError
from launch.kubernetes import Kubernetes
from launch.local import Local
from launch.scheduler import Cluster, Job, Scheduler
from launch.slurm import Slurm


@dataclass(frozen=True)
class MachineConfig(Cluster):
    """`machine:` of configs/machines/*.yaml. A scheduler is its own file and one line here: its settings."""

    kind: str = "local"
    slurm: Slurm = field(default_factory=Slurm)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in self.schedulers:
            raise UserError(f"machine.kind={self.kind} must be one of {', '.join(self.schedulers)}")
        if self.kind == "local" and self.nodes > 1 and self.host in ("127.0.0.1", "localhost"):
            raise UserError("machine.nodes > 1 needs machine.host=<name of node 0>, the same on all nodes")

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """By `kind`."""
        return {"local": Local(), **{name: value for name, value in vars(self).items() if isinstance(value, Scheduler)}}

    def render(self, job: Job) -> str:
        """The line, script or manifests of the job; UserError for a job that cannot run there."""
        return self.schedulers[self.kind].render(self, job)

    def start(self, job: Job, script: str | None, dry_run: bool) -> int:
        """Starts the job, or writes it to `script` and submits that, or only prints it. The exit status."""
        scheduler = self.schedulers[self.kind]
        if dry_run or (scheduler.command and not script):
            print(self.render(job), end="")
            return 0
        return scheduler.submit(self, job, script or "")
