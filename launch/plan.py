"""What a run will hold and compute, found out by rehearsing it without data, before any machine is asked for."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from multiprocessing import get_context
from typing import TypeVar

import torch

from configs import build, merge_args
from configs.cli import table
from configs.errors import UserError
from launch.machine import MachineConfig
from launch.node import GIB, memory_gib
from launch.run import Launch, read_launch
from train.config import TrainConfig
from train.rehearsal import ClipSize, Rehearsed, base_process, clip_size, rehearse

T = TypeVar("T")

MOST_PIXELS = 10**9  # of latents, per process and step: 70,000 latents of 720p; more takes hours to rehearse
BASE = "base process"
ON_HOST = ("optimizer's states", "float32 weights", "average")  # where engine.offload is not `nothing`
UNPLANNED = ("codec", "out", "manifest")  # what a run needs and a plan does not


@dataclass(frozen=True)
class PlanConfig:
    """What `python -m launch plan` is told besides the machine and the run."""

    height: int | None = None  # px of a frame; like the next two, the manifest's if left out
    width: int | None = None
    latents: int | None = None  # of a clip
    memory_gib: float | None = None  # of a device, or of a process on a CPU; of this machine's if left out
    mfu: float | None = None  # share of peak_tflops that the run will reach

    def __post_init__(self) -> None:
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise UserError(f"memory_gib={self.memory_gib:g} must be a positive number")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise UserError(f"mfu={self.mfu:g} must lie above 0 and not above 1: it is a share of peak_tflops=")

    @property
    def whole(self) -> bool:
        """Whether no manifest is needed to know what a clip is."""
        return None not in (self.height, self.width, self.latents)


@dataclass(frozen=True)
class Plan:
    """One run, rehearsed."""

    run: Rehearsed
    held: dict[str, int]  # bytes of a device (on a CPU: of a process) by purpose, at the moment of the peak
    on_host: dict[str, int]  # bytes that are put off to the CPU's memory

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def fits(self, limit_gib: float) -> bool:
        return self.total <= limit_gib * GIB


class Planner:
    """Plans for one machine and clip size, with a few words more or less."""

    def __init__(self, words: Sequence[str], config: PlanConfig) -> None:
        self.config, self.words = config, tuple(words)
        self.bases: dict[str, int] = {}  # by engine

    def read(self, extra: Sequence[str] = ()) -> Launch:
        """The run with `extra` words. Raises ValueError in one line."""
        return read_launch([*self.words, *extra])

    def plan(self, extra: Sequence[str] = ()) -> Plan:
        """The plan of the run with `extra` words."""
        given, config = self.read(extra), self.config
        on_cpu, engine = given.machine.device == "cpu", given.train.engine
        clip = clip_size(given.train, config.height, config.width, config.latents)
        step = clip.latents * clip.rows * clip.columns * given.train.batch * given.train.accumulation
        if step > MOST_PIXELS:
            raise UserError(
                f"a step of {step:.1e} latent pixels per process is beyond what a plan is for; give smaller or fewer "
                "clips (latents=, height=, width=, batch=, accumulation=)"
            )
        run = apart(rehearse, given.train, clip, given.machine.ranks, on_cpu)
        held, off = dict(run.held), not on_cpu and engine.offload != "nothing"
        on_host = {name: held.pop(name) for name in ON_HOST if name in held} if off else {}
        if on_cpu and engine.name not in self.bases:
            self.bases[engine.name] = apart(base_process, given.train)
        return Plan(run, {**held, BASE: self.bases[engine.name]} if on_cpu else held, on_host)


def apart(task: Callable[..., T], *given: TrainConfig | ClipSize | int | bool) -> T:
    """`task(*given)` in a process of its own, which a rehearsal leaves changed, and whose peak is measured."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_mute) as pool:
        try:
            return pool.submit(task, *given).result()
        except BrokenProcessPool as error:
            fault = "the rehearsal was killed (out of memory?); plan on a machine with more, or for a smaller model"
            raise ChildProcessError(fault) from error


def _mute() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed greets on stdout


def read_plan(words: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """The plan's settings, and the words of the machine and the run. Raises ValueError in one line."""
    own = {one.name for one in fields(PlanConfig)}
    mine = [word for word in words if word.partition("=")[0] in own]
    rest = [word for word in words if word not in mine]
    config, merged = build(PlanConfig, merge_args(mine)), merge_args(rest)
    data = "manifest" in merged or "manifests" in merged
    if not data and not config.whole:
        raise UserError("no clips to plan for: give manifest=..., or height= width= latents=")
    absent = [name for name in UNPLANNED if name not in merged and not (name == "manifest" and data)]
    return config, [*rest, *(f"{name}=unplanned" for name in absent)]


def limit_gib(config: PlanConfig, machine: MachineConfig) -> float:
    """What a device may hold; on a CPU, a process."""
    if config.memory_gib is not None:
        return config.memory_gib
    if machine.kind == "local" and machine.device == "cpu":
        return memory_gib()[0] / machine.processes
    if machine.kind == "local" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    raise UserError("how much a device of that machine holds is not known here: give memory_gib=")


def plan(words: list[str]) -> int:
    """What a run will hold and compute, and whether it fits: 0 if it does, 1 if not, with words that make it fit."""
    config, rest = read_plan(words)
    planner = Planner(rest, config)
    given = planner.read()
    if config.mfu is not None and given.train.peak_tflops is None:
        raise UserError(f"mfu={config.mfu:g} is a share of peak_tflops=, which is not given")
    limit = limit_gib(config, given.machine)
    os.environ.update(given.machine.environment)  # what the run's processes would have
    found = planner.plan()
    print(describe(found, given, config.mfu), flush=True)
    if found.fits(limit):
        print(f"fits: {found.total / GIB:.2f} of {limit:.2f} GiB")
        return 0
    print(f"does not fit: {found.total / GIB:.2f} of {limit:.2f} GiB; trying what would", flush=True)
    print(advise(planner, found, limit))
    return 1


def describe(found: Plan, given: Launch, mfu: float | None) -> str:
    """The plan as tables."""
    run, machine, train = found.run, given.machine, given.train
    moment, on_cpu = max(run.peaks, key=lambda name: run.peaks[name]), machine.device == "cpu"
    held = sorted(found.held.items(), key=lambda item: -item[1])
    rows = [[f"on each {'process' if on_cpu else 'device'}, while {moment}", "GiB"]]
    rows += [[name, f"{size / GIB:.3f}"] for name, size in held if size >= 2**19]
    rows += [["total", f"{found.total / GIB:.3f}"]]
    rows += [[f"{name}, in the CPU's memory", f"{size / GIB:.3f}"] for name, size in found.on_host.items()]
    per_step = [
        ["what", "how much"],
        ["parameters", f"{run.parameters:,}"],
        ["clips per step", f"{machine.ranks * train.batch * train.accumulation:,}"],
        ["video tokens per step", f"{machine.ranks * run.tokens:,}"],
        ["TFLOPs per step", f"{machine.ranks * run.flops / 1e12:.4g}"],
    ]
    if mfu is not None and train.peak_tflops is not None:
        seconds = run.flops / (mfu * train.peak_tflops * 1e12)
        per_step += [["s/step", f"{seconds:.4g} at mfu={mfu:g} of {train.peak_tflops:g} TFLOP/s per device"]]
    left_out = "CUDA's context, NCCL's buffers, kernels' workspaces"
    if on_cpu:
        left_out = "the loader, the launcher, freed memory that glibc and MKL keep (measured: 11 to 31 % more)"
    moments = ", ".join(f"{name} {size / GIB:.3f}" for name, size in run.peaks.items())
    notes = [f"at most, in GiB without the base process: {moments}", f"not counted: {left_out}"]
    return "\n".join([table(per_step), "", table(rows), "", *notes])


def changes(train: TrainConfig, machine: MachineConfig) -> Iterator[list[str]]:
    """The next words that could save memory without another result, the cheapest first."""
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


def advise(planner: Planner, found: Plan, limit: float) -> str:
    """The words that make it fit, each of them rehearsed, or the best that they do."""
    words, least, tried = list[str](), found, set[tuple[str, ...]]()
    while not least.fits(limit):
        given = planner.read(words)
        step = next((one for one in changes(given.train, given.machine) if tuple(one) not in tried), None)
        if step is None:
            break
        tried.add(tuple(step))
        changed = planner.plan([*words, *step])
        if changed.total < least.total:
            latest = dict(word.split("=", 1) for word in [*words, *step])
            words, least = [f"{name}={value}" for name, value in latest.items()], changed
    if least.fits(limit):
        return f"it fits, with {least.total / GIB:.2f} GiB, with {' '.join(words)}"
    best = f"; the least is {least.total / GIB:.2f} GiB with {' '.join(words)}" if words else ""
    return f"nothing tried makes it fit{best}; use more processes, shorter or smaller clips, or a smaller model"
