"""The training loop, straight down."""

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from configs import storage
from configs.errors import FileError, UserError
from configs.files import write_text
from data_pipeline.stream import Stream
from data_pipeline.types import Batch
from model.flow import FlowMatch
from model.world import WorldModelConfig
from train.build import build_engine
from train.check import agree, check_run
from train.checkpoint import Position, load_checkpoint
from train.config import STOPPED, TrainConfig
from train.ema import Ema
from train.engine import Engine, gather_objects
from train.engines import start_accelerator
from train.evaluate import Validation
from train.figures import Interval, Scale, StepFigures, describe, per_rank
from train.log import Log, require_tensorboard
from train.objectives import Objective, figure_block
from train.objectives.draws import make_draws
from train.optim import learning_rate
from train.profiler import Profiler
from train.run_folder import held_run_folder, with_local_out
from train.save import Saver
from train.videos import Videos, averaged_world
from train.watchdog import Watchdog


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (Slurm's warning) or Ctrl-C; the loop finishes its step, saves and returns.

    SIGTERM ends a process that is still starting: there is nothing to save, and a rank that it waits for may be gone.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def starts(self) -> None:
        """From now on there is something to save."""
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@dataclass(frozen=True)
class Run:
    """The parts of one training run, all of them ready."""

    config: TrainConfig
    objective: Objective
    flow: FlowMatch
    engine: Engine
    ema: Ema
    stop: StopRequest
    world: WorldModelConfig
    data: str  # digest of the manifest
    scale: Scale
    watchdog: Watchdog
    saver: Saver
    profiler: Profiler
    validation: Validation | None
    videos: Videos | None


def train(config: TrainConfig) -> bool:
    """Train a world model on latent shards; run again, it goes on from its newest complete checkpoint. Whether it was
    asked to stop before it was done."""
    asked = with_local_out(config)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    checked = check_run(asked, ranks)
    if asked.tensorboard:
        require_tensorboard()
    config, world = checked.config, checked.world
    stream = Stream(config.sources, config.batch, config.seed, rank, ranks, config.workers, loader=config.loader)
    stop = StopRequest()
    accelerator = start_accelerator(config)
    url = config.checkpoints if storage.is_s3(config.checkpoints) else ""
    watchdog = Watchdog(Path(config.out), rank, ranks, config.engine.timeout_s, url)
    with watchdog.watching(), memory(config), held_run_folder(config, rank):
        checked = agree(asked, checked, ranks)
        resumed, start = checked.resumed, checked.start
        watchdog.begins(start, "building the model")
        engine = build_engine(accelerator, config, checked.init)
        ema = Ema(engine, config.ema_decay)
        if resumed:
            watchdog.begins(start, "loading the checkpoint")
            load_checkpoint(engine, ema, resumed)
        flow, objective = FlowMatch(config.flow), checked.objective
        clips, places = ranks * config.batch * config.accumulation, checked.manifest.clip_latents
        run = Run(
            config, objective, flow, engine, ema, stop, world, checked.data,
            Scale(config.model, ranks, clips, places, figure_block(objective), config.peak_tflops),
            watchdog,
            Saver(engine, ema, config, world),
            Profiler(config, rank),
            Validation(config, engine, flow) if config.validation.manifest else None,
            Videos(config, world) if config.validation.videos.every else None,
        )  # fmt: skip
        with closing(Log(config, start, accelerator.is_main_process)) as log:
            if resumed:
                log.say(f"resumed from {resumed} at step {start}")
            if config != asked:
                log.say(f"on {ranks} ranks the same clips per step are batch {config.batch} x {config.accumulation}")
            stop.starts()
            on_gpu = engine.accelerator.device.type == "cuda"
            with closing(stream.batches(start * config.accumulation, pin_memory=on_gpu)) as batches:
                stopped = run_steps(run, range(start, config.steps), batches, log)
            if start >= config.steps:
                log.say(f"nothing to do: {resumed} has all {config.steps} steps")
    engine.shutdown()
    return stopped


def run_steps(run: Run, steps: range, batches: Iterator[Batch], log: Log) -> bool:
    """Trains `steps`, or until a stop is asked for, and says whether one was; figures, validation and checkpoints when
    they are due."""
    config, engine, interval = run.config, run.engine, Interval(run.scale)
    ranks, rank = engine.accelerator.num_processes, engine.accelerator.process_index
    for step in steps:
        engine.set_learning_rate(rate := learning_rate(config.optim, step, config.steps))
        run.profiler.begins(step)
        figures, waited_s = StepFigures(run.scale), interval.waited_s
        forward_s, applied = compute_step(run, step, batches, figures, interval)
        if applied:
            run.ema.update(step)
        else:
            interval.skipped += 1
            figures.sums.zero_()  # its losses count as little as its gradients
        # One exchange tells every rank the figures of all and whether any of them was asked to stop.
        mine = per_rank(rank, ranks, forward_s, interval.waited_s - waited_s)
        told = (figures.sums, figures.work, mine, torch.tensor([float(run.stop.asked)]))
        sums, work, by_rank, asked = sum_all_over_ranks(engine, told)
        with interval.paused():
            if trace := run.profiler.ends(step):
                log.say(f"step {step + 1}: traced into {trace}")
        stopping = bool(asked > 0)
        done, last = step + 1, step + 1 == config.steps or stopping
        interval.add(sums, work, by_rank)
        log.advance(describe(sums, run.scale.block).get("loss", math.nan), interval.data_wait)
        if done % config.log_every == 0 or last:
            log.write(done, {**interval.figures(), "grad_norm": engine.grad_norm, "learning_rate": rate})
            interval.restart()
        with interval.paused():
            if not stopping or done == config.steps:  # else the save comes first: the grace may be short
                validate(run, done, log)
            if done % config.checkpoint.every == 0 or last:
                save(run, done, last, log)
            run.saver.check()
        if stopping:
            if engine.accelerator.is_main_process:
                write_text(Path(config.out) / STOPPED, f"step {done}\n")
            log.say(f"stopped at step {done} of {config.steps} as asked; the same command goes on from here")
            return True
    return False


def compute_step(
    run: Run, step: int, batches: Iterator[Batch], figures: StepFigures, interval: Interval
) -> tuple[float, bool]:
    """The micro-steps of a step, what they say being added to `figures`: seconds in forward passes, and whether the
    gradients were applied. A loss or a gradient that is not finite on any rank drops all of the step, on all of them.

    Raises ValueError in one line, on every rank, if it is to stop the run instead: nothing of it reached the weights.
    """
    config, engine, forward_s, fine, applied = run.config, run.engine, 0.0, True, True
    ranks, rank = engine.accelerator.num_processes, engine.accelerator.process_index
    for micro in range(config.accumulation):
        run.watchdog.begins(step, "waiting for data")
        with interval.waiting():
            batch = next(batches).to(engine.accelerator.device)
        run.watchdog.begins(step, "computing")
        micro_step = step * config.accumulation + micro
        draws = make_draws(config.seed, step, (micro_step * ranks + rank) * config.batch, config.batch)
        with engine.accumulate():
            began = time.perf_counter()
            loss, part = run.objective.loss(engine.model, run.flow, batch, step / config.steps, draws)
            finite = bool(torch.isfinite(loss))  # waits for an accelerator, but for no other rank
            forward_s += time.perf_counter() - began
            fine = not spoiled(run, step, finite, batch) and fine
            applied = engine.backward(loss, apply=fine)
        figures.add(part, batch.skipped)
    if fine and not applied and config.on_nonfinite == "stop":
        raise UserError(
            f"step {step}: the gradient is not finite, though the loss is; nothing of it has reached the weights, and "
            f"the newest checkpoint of {config.out} is from before it: lower the learning rate, look at the clips, or "
            "say on_nonfinite=skip"
        )
    return forward_s, applied


def spoiled(run: Run, step: int, finite: bool, batch: Batch) -> bool:
    """Whether the loss is NaN or infinite (not `finite`) on any rank, so that this step is to be skipped on all of
    them.

    Raises ValueError in one line, on every rank, if that is to stop the run.
    """
    ranks, rank = run.engine.accelerator.num_processes, run.engine.accelerator.process_index
    flags = torch.zeros(ranks)
    flags[rank] = float(not finite)
    bad = run.engine.sum_over_ranks(flags).nonzero().flatten().tolist()
    if bad and run.config.on_nonfinite == "stop":
        clips = gather_objects(list(batch.ids))
        where = "; ".join(f"rank {one}: {', '.join(clips[one])}" for one in bad)
        raise UserError(
            f"step {step}: the loss is not finite on {where}; the newest checkpoint of {run.config.out} is from before "
            "it: look at these clips, lower the learning rate, or say on_nonfinite=skip"
        )
    return bool(bad)


def sum_all_over_ranks(engine: Engine, parts: Sequence[Tensor]) -> list[Tensor]:
    """Each of `parts` added up over all ranks, in one exchange."""
    total = engine.sum_over_ranks(torch.cat([part.flatten() for part in parts]))
    summed = total.split([part.numel() for part in parts])
    return [one.reshape(part.shape) for one, part in zip(summed, parts, strict=True)]


def validate(run: Run, done: int, log: Log) -> None:
    """Held-out losses and videos after `done` steps, if they are due."""
    config, last = run.config.validation, done == run.config.steps
    if run.validation and (done % config.every == 0 or last):
        run.watchdog.begins(done - 1, "validating")
        log.write(done, found := run.validation.measure())
        log.say(f"step {done}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    if run.videos and (done % config.videos.every == 0 or last):
        began = time.perf_counter()
        with run.watchdog.main_alone(done - 1, "making videos") as alive:
            world = averaged_world(run.config, run.world, run.engine, run.ema)
            if world is not None:
                log.show(done, run.videos.make(world, done, alive))
        log.say(f"step {done}: videos in {run.videos.folder}, training waited {time.perf_counter() - began:.1f} s")


def save(run: Run, done: int, last: bool, log: Log) -> None:
    """A checkpoint after `done` steps, with what it cost."""
    config, ranks, began = run.config, run.engine.accelerator.num_processes, time.perf_counter()
    run.watchdog.begins(done - 1, "saving")
    folder = run.saver.save(Position(done, ranks, config.batch, config.accumulation, config.seed, run.data))
    if last:  # no rank ends before it is there: if one is lost until then, all have to begin again
        with run.watchdog.main_alone(done - 1, "writing the last checkpoint"):
            run.saver.finish()
        if not all(gather_objects(run.saver.fault is None)):
            raise run.saver.fault or FileError(f"another rank cannot write {folder}, and says why")
    if run.saver.fault is None:  # else it has been said, or `check` raises it
        took = f"{time.perf_counter() - began:.1f} s"
        log.say(f"step {done}: {'saving' if run.saver.saving else 'saved'} {folder}, training waited {took}")


@contextmanager
def memory(config: TrainConfig) -> Iterator[None]:
    """Within the block, memory that is not there is a ValueError of one line: what was asked for, what to lower."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in said:
            raise
        more = {"deepspeed": "engine.stage=3, engine.offload=optimizer", "ddp": "engine.name=deepspeed engine.stage=3"}
        words = ", ".join(["model.checkpoint_every=1", more.get(config.engine.name, "more processes")])
        raise UserError(
            f"out of memory on rank {os.environ.get('RANK', '0')} with batch={config.batch}: {said}; lower batch and "
            f"raise accumulation by as much, or try {words}"
        ) from error
