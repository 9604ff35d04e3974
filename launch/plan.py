"""What a run will hold and compute, and whether it fits, before any machine is asked for."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import psutil
import torch

from configs import build, merge_args, within
from configs.cli import table
from configs.errors import UserError
from launch.machine import MachineConfig
from launch.node import GIB
from launch.run import Launch, read_launch
from train.config import TrainConfig
from train.estimate_memory import MemoryEstimate, clip_size, estimate_memory

MOST_PIXELS = 10**9  # of latents, per process and step: 70,000 latents of 720p; more is a slip of the finger
OFFLOADED = ("optimizer's states", "float32 weights", "average")  # where engine.offload is not `nothing`
UNPLANNED = ("codec", "out", "manifest")  # what a run needs and a plan does not
NOT_COUNTED = (
    "not counted: what is offloaded to the CPU, CUDA's context, NCCL's buffers, kernels' workspaces; on a CPU the "
    "loader, the launcher, freed memory that glibc and MKL keep"
)


@dataclass(frozen=True)
class PlanConfig:
    """The settings of `python -m launch plan` besides the machine and the run."""

    height: int | None = None  # px of a frame; like the next two, the manifest's if left out
    width: int | None = None
    latents: int | None = None  # of a clip
    memory_gib: float | None = within(1e-3, 1e9, None)  # of a device, or a process on a CPU; else this machine's
    mfu: float | None = within(1e-6, 1, None)  # share of peak_tflops= that the run will reach


def read_plan(args: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's settings, and the arguments of the machine and the run."""
    names = {field.name for field in fields(PlanConfig)}
    mine = [arg for arg in args if arg.partition("=")[0] in names]
    rest = [arg for arg in args if arg not in mine]
    config, merged = build(PlanConfig, merge_args(mine)), merge_args(rest)
    if not merged.keys() & {"manifest", "manifests"} and None in (config.height, config.width, config.latents):
        raise UserError("no clips to plan for: give manifest=..., or height= width= latents=")
    absent = [name for name in UNPLANNED if name not in merged and not (name == "manifest" and "manifests" in merged)]
    return config, [*rest, *(f"{name}=unplanned" for name in absent)]


def plan(args: list[str]) -> int:
    """What a run will hold and compute, and whether it fits: 0 if it does, 1 if not, with settings that make it fit."""
    config, rest = read_plan(args)
    run = read_launch(rest)
    if config.mfu is not None and run.train.peak_tflops is None:
        raise UserError(f"mfu={config.mfu:g} is a share of peak_tflops=, which is not given")
    limit = device_gib(config, run.machine)
    os.environ.update(run.machine.environment)  # what the run's processes would have
    memory = estimate(run, config)
    print(describe(memory, run, config.mfu), flush=True)
    if memory.total <= limit * GIB:
        print(f"fits: {memory.total / GIB:.2f} of {limit:.2f} GiB")
        return 0
    print(f"does not fit: {memory.total / GIB:.2f} of {limit:.2f} GiB; trying what would", flush=True)
    print(advise(rest, config, memory, limit))
    return 1


def estimate(run: Launch, config: PlanConfig) -> MemoryEstimate:
    """What a device, or on a CPU a process, of the run holds."""
    clip = clip_size(run.train, config.height, config.width, config.latents)
    pixels = math.prod(clip) * run.train.batch * run.train.accumulation
    if pixels > MOST_PIXELS:
        smaller = "give smaller or fewer clips (latents=, height=, width=, batch=, accumulation=)"
        raise UserError(f"{pixels:.1e} latent pixels per process and step are beyond what a plan is for; {smaller}")
    memory = estimate_memory(run.train, clip, run.machine.ranks, run.machine.device == "cpu")
    if run.machine.device == "cuda" and run.train.engine.offload != "nothing":
        for name in OFFLOADED:
            memory.bytes.pop(name, None)
    return memory


def device_gib(config: PlanConfig, machine: MachineConfig) -> float:
    """What a device may hold; on a CPU, a process."""
    if config.memory_gib is not None:
        return config.memory_gib
    if machine.kind == "local" and machine.device == "cpu":
        return psutil.virtual_memory().total / GIB / machine.processes
    if machine.kind == "local" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    raise UserError("how much a device of that machine holds is not known here: give memory_gib=")


def describe(memory: MemoryEstimate, run: Launch, mfu: float | None) -> str:
    """The plan as tables."""
    machine, train = run.machine, run.train
    by_size = sorted(memory.bytes.items(), key=lambda item: -item[1])
    rows = [[f"on each {'process' if machine.device == 'cpu' else 'device'}", "GiB"]]
    rows += [[name, f"{size / GIB:.3f}"] for name, size in by_size if size >= 2**19]
    rows += [["total", f"{memory.total / GIB:.3f}"]]
    per_step = [
        ["what", "how much"],
        ["parameters", f"{memory.parameters:,}"],
        ["clips per step", f"{machine.ranks * train.batch * train.accumulation:,}"],
        ["video tokens per step", f"{machine.ranks * memory.tokens:,}"],
        ["TFLOPs per step", f"{machine.ranks * memory.flops / 1e12:.4g}"],
    ]
    if mfu is not None and train.peak_tflops is not None:
        seconds = memory.flops / (mfu * train.peak_tflops * 1e12)
        per_step += [["s/step", f"{seconds:.4g} at mfu={mfu:g} of {train.peak_tflops:g} TFLOP/s per device"]]
    return "\n".join([table(per_step), "", table(rows), "", NOT_COUNTED])


def changes(train: TrainConfig, machine: MachineConfig) -> Iterator[list[str]]:
    """The next settings that could save memory without another result, the cheapest first."""
    engine, ranks = train.engine, machine.ranks
    if not train.model.checkpoint_every:
        yield ["model.checkpoint_every=1"]
    if engine.name == "ddp" and ranks > 1:
        yield ["engine.name=deepspeed", "engine.stage=2"]
    if engine.name == "deepspeed" and engine.stage < 3 and ranks > 1:
        yield from ([f"engine.stage={stage}"] for stage in range(engine.stage + 1, 4))
    if train.batch > 1:
        parts = next(n for n in range(2, train.batch + 1) if train.batch % n == 0)
        yield [f"batch={train.batch // parts}", f"accumulation={train.accumulation * parts}"]
    if machine.device == "cuda" and engine.name == "deepspeed" and engine.offload == "nothing":
        yield ["engine.offload=optimizer"]


def advise(args: list[str], config: PlanConfig, memory: MemoryEstimate, limit: float) -> str:
    """The settings that make it fit, each of them estimated, or the best that they do."""
    best, settings, tried = memory, dict[str, str](), list[list[str]]()
    while True:
        chosen = [f"{name}={value}" for name, value in settings.items()]
        if best.total <= limit * GIB:
            return f"it fits, with {best.total / GIB:.2f} GiB, with {' '.join(chosen)}"
        run = read_launch([*args, *chosen])
        step = next((change for change in changes(run.train, run.machine) if change not in tried), None)
        if step is None:
            break
        tried.append(step)
        changed = estimate(read_launch([*args, *chosen, *step]), config)
        if changed.total < best.total:
            settings |= dict(setting.split("=", 1) for setting in step)
            best = changed
    least = f"; the least is {best.total / GIB:.2f} GiB with {' '.join(chosen)}" if chosen else ""
    return f"nothing tried makes it fit{least}; use more processes, shorter or smaller clips, or a smaller model"
