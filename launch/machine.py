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

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """By `kind`."""
        return {"local": Local(), **{name: value for name, value in vars(self).items() if isinstance(value, Scheduler)}}

    def render(self, job: Job) -> str:
        """What the scheduler is given, as text; UserError for a job that cannot run there."""
        return self.schedulers[self.kind].render(self, job)

    def start(self, job: Job, script: str | None, dry_run: bool) -> int:
        """Starts the job, or writes it to `script` and submits that; with `dry_run` prints it. The exit status."""
        if dry_run:
            print(self.render(job), end="")
            return 0
        return self.schedulers[self.kind].submit(self, job, script)
