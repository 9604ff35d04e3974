"""One run from the command line: checked first, then started here or handed to a scheduler."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from configs import build, flat
from configs.errors import UserError
from configs.overrides import is_override, merge_args
from launch.machine import MachineConfig
from launch.scheduler import Cluster, Job
from train.check import check_run
from train.config import TrainConfig


@dataclass(frozen=True)
class LaunchConfig:
    """The settings that the training program does not get."""

    machine: MachineConfig
    dry_run: bool = False  # only print
    script: str | None = None  # file for the Slurm script or the Kubernetes manifests; none: they are printed


OWN = tuple(setting.name for setting in fields(LaunchConfig))


@dataclass(frozen=True, kw_only=True)
class Launch(LaunchConfig):
    """A run and where it goes."""

    train: TrainConfig
    args: tuple[str, ...]  # of the training program

    @property
    def job(self) -> Job:
        def line(rank: str | None, host: str | None) -> list[str]:
            return accelerate_line(self.machine, self.train.engine.name, self.args, rank, host)

        return Job(self.machine.name, line, saves_to=self.train.out)


def read_launch(args: Sequence[str]) -> Launch:
    """The arguments, split into the machine's and the run's. What a machine's file says of the run counts more than the
    run's own files, and less than the settings after them."""
    args = sorted(args, key=lambda arg: 2 if is_override(arg) else int("machine" in merge_args([arg], False)))
    merged = merge_args(args)
    if "machine" not in merged:
        raise UserError("no machine: begin with a file of configs/machines")
    own = build(LaunchConfig, {name: merged.pop(name) for name in OWN if name in merged})
    passed_on = tuple(part for arg in args for part in _for_trainer(arg))
    return Launch(**vars(own), train=build(TrainConfig, merged), args=passed_on)


def _for_trainer(arg: str) -> list[str]:
    """What the training program gets of an argument: a machine's file becomes the settings in it that are the run's."""
    if is_override(arg):
        return [] if arg.partition("=")[0].partition(".")[0] in OWN else [arg]
    settings = merge_args([arg], resolve=False)  # a value may refer to another file's
    if "machine" not in settings:
        return [arg]
    others = flat({name: value for name, value in settings.items() if name not in OWN})
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in others.items()]


def accelerate_line(
    cluster: Cluster, engine: str, args: Sequence[str], rank: str | None = None, host: str | None = None
) -> list[str]:
    """The command that starts one node's trainers. `rank` and `host` are what a scheduler's script puts there.

    Accelerate only starts the processes: what an engine is told comes from the training config (train/engine.py).
    """
    line = ["python", "-m", "launch", "accelerate"]
    line += ["--num_processes", str(cluster.ranks), "--num_machines", str(cluster.nodes)]
    if cluster.nodes > 1:
        line += ["--machine_rank", rank or str(cluster.node_rank), "--main_process_ip", host or cluster.host]
    line += ["--main_process_port", str(cluster.port)]
    if engine == "deepspeed":
        # DeepSpeed's own launchers go over ssh; `standard` is torch's, as everywhere else.
        line += ["--use_deepspeed", *(["--deepspeed_multinode_launcher", "standard"] if cluster.nodes > 1 else [])]
    elif cluster.ranks > 1:
        line += ["--multi_gpu"]  # on a CPU too: Accelerate starts one process otherwise
    # Stated, because Accelerate's default config file may say something else on one of the nodes.
    return [*line, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "train", *args]


def launch(args: list[str]) -> int:
    """Start a run, or write it down for a scheduler: configs/machines/X.yaml configs/train/Y.yaml ... dry_run=true"""
    run = read_launch(args)
    run.machine.render(run.job)  # UserError for what cannot run there
    check_run(run.train, run.machine.ranks)
    return run.machine.start(run.job, run.script, run.dry_run)
