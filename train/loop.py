"""The training loop, straight down."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from configs import load_config, storage
from configs.errors import FileError, UserError, is_users
from data_pipeline.stream import Stream
from data_pipeline.types import Batch
from model.flow import FlowMatch
from train.check import CheckedRun, agree, check_run
from train.checkpoint import Position, state_of
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine, gather_objects
from train.engines import build_engine, start_accelerator
from train.exit import ASKED, FAULT, STOPPED, StopRequest, needs_a_person, report_exit
from train.log import Log
from train.metrics import MetricsWindow, start_profiler
from train.objectives.objective import LossMetrics, rng_for_step
from train.optim import rate_factor
from train.run_folder import sole_run
from train.save import Saver
from train.validation import HeldOutLoss, averaged_world
from train.watchdog import Watchdog

NONFINITE_HINT = "no weight has changed; lower the learning rate, look at these clips, or say on_nonfinite=skip"


def main(args: list[str]) -> None:
    """Train a world model on latent shards (the default: an argument that is no verb begins its settings)."""
    try:
        if train(load_config(TrainConfig, args)):
            report_exit(ASKED)
    except (ValueError, OSError) as error:
        if is_users(error):
            if needs_a_person(error):
                report_exit(FAULT)
            # Every rank meets the same error: rank 0 prints it, and the launcher ends the others while they wait here.
            if os.environ.get("RANK", "0") != "0":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(5)
        raise


class Run:
    """The parts of one training run."""

    def __init__(self, checked: CheckedRun, engine: Engine, log: Log, watchdog: Watchdog) -> None:
        self.checked, self.engine, self.log, self.watchdog = checked, engine, log, watchdog
        self.config, self.objective, self.videos = checked.config, checked.objective, checked.videos
        self.flow = FlowMatch(self.config.flow)
        self.ema = Ema(engine, self.config.ema_decay)
        self.saver = Saver(engine, self.ema, self.config, checked.world)
        self.metrics = MetricsWindow(self.config, checked.manifest.clip_latents, self.objective.loss_group)
        heldout = self.config.validation.manifest
        self.heldout = HeldOutLoss(self.config, self.objective, engine, self.flow) if heldout else None


def train(config: TrainConfig) -> bool:
    """Train a world model on latent shards; run again, it continues from its newest complete checkpoint.

    Returns whether it was asked to stop early, for which it takes over SIGTERM, SIGINT and SIGUSR1.
    """
    asked, rank, ranks = config, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    checked = check_run(asked, ranks)
    config = checked.config
    stream = Stream(config.sources, config.batch, config.seed, (rank, ranks), config.workers, config.loader)
    stop = StopRequest()
    accelerator = start_accelerator(config)
    url = config.out if storage.is_s3(config.out) else ""
    watchdog = Watchdog(config.folder, rank, ranks, config.engine.timeout_s, url)
    with watchdog.watching(), out_of_memory_explained(config), sole_run(config, rank):
        checked = agree(asked, checked, ranks)
        watchdog.begins(checked.start, "building the model")
        engine = build_engine(accelerator, config, checked.init)
        with closing(Log(config, checked.start, accelerator.is_main_process)) as log:
            run = Run(checked, engine, log, watchdog)
            begin(run, asked)
            # Until now SIGTERM ended the process: it had nothing to save, and may have waited for a rank that is gone.
            stop.listen(signal.SIGTERM)
            on_gpu = engine.accelerator.device.type == "cuda"
            with closing(stream.batches(checked.start * config.accumulation, pin_memory=on_gpu)) as batches:
                stopped = run_steps(run, range(checked.start, config.steps), batches, stop)
    engine.shutdown()
    return stopped


def begin(run: Run, asked: TrainConfig) -> None:
    """Loads the checkpoint that the run continues from, and says what differs from what was asked."""
    checked, config, log, ranks = run.checked, run.config, run.log, run.engine.accelerator.num_processes
    if checked.resumed:
        run.watchdog.begins(checked.start, "loading the checkpoint")
        saved = state_of(checked.resumed)
        run.engine.restore(saved)
        run.ema.restore(saved)
        log.say(f"resumed from {checked.resumed} at step {checked.start}")
    if (config.batch, config.accumulation) != (asked.batch, asked.accumulation):
        log.say(f"on {ranks} ranks the same clips per step are batch {config.batch} x {config.accumulation}")
    if checked.start >= config.steps:
        log.say(f"nothing to do: {checked.resumed} has all {config.steps} steps")


def run_steps(run: Run, steps: range, batches: Iterator[Batch], stop: StopRequest) -> bool:
    """Trains until all steps are done or a stop is asked for, and returns whether one was."""
    config, engine, log = run.config, run.engine, run.log
    profiler = start_profiler(config, engine.accelerator.process_index, steps.start, log.say)
    for step in steps:
        factor = rate_factor(config.optim, step, config.steps)
        engine.scale_learning_rates(factor)
        with run.metrics.timing("step"):
            if train_step(run, step, batches):
                run.ema.update(step)
            stopping = bool(engine.sum_over_ranks(torch.tensor(float(stop.asked))))
        profiler.step()
        log.progress.update()
        done, last = step + 1, stopping or step + 1 == config.steps
        if done % config.log_every == 0 or last:
            rate = factor * config.optim.learning_rate
            log.write(done, {**run.metrics.reduce(engine), "grad_norm": engine.grad_norm, "learning_rate": rate})
        if not stopping or done == config.steps:  # else the save comes first: the grace may be short
            validate(run, done)
        if done % config.checkpoint.every == 0 or last:
            save(run, done, last)
        run.saver.check()
        if stopping:
            if log.main:
                storage.write_text(config.folder / STOPPED, f"step {done}\n")
            log.say(f"stopped at step {done} of {config.steps} as asked; the same command continues from here")
            return True
    return False


def train_step(run: Run, step: int, batches: Iterator[Batch]) -> bool:
    """The micro-steps of one optimizer step. Returns whether their gradients were applied: a loss or a gradient that is
    not finite on any rank drops the whole step, on all ranks."""
    config, engine, metrics = run.config, run.engine, run.metrics
    ranks, rank = engine.accelerator.num_processes, engine.accelerator.process_index
    finite, applied, parts = True, True, list[LossMetrics]()
    for micro in range(config.accumulation):
        run.watchdog.begins(step, "waiting for data")
        with metrics.timing("waiting"):
            batch = next(batches).to(engine.accelerator.device)
        metrics.skipped_clips += batch.skipped
        run.watchdog.begins(step, "computing")
        first_sample = ((step * config.accumulation + micro) * ranks + rank) * config.batch
        rng = rng_for_step(config.seed, step, first_sample, config.batch)
        with engine.accumulate():
            with metrics.timing("forward"):
                loss, part = run.objective.loss(engine.model, run.flow, batch, step / config.steps, rng)
                ok = bool(torch.isfinite(loss))  # waits for an accelerator, but for no other rank
            parts.append(part)
            finite = finite_on_all_ranks(run, step, ok, batch) and finite
            applied = engine.backward(loss, apply=finite)
    if finite and not applied and config.on_nonfinite == "stop":
        raise UserError(f"step {step}: the gradient is not finite, though the loss is; {NONFINITE_HINT}")
    metrics.end_step(parts, applied)
    return applied


def finite_on_all_ranks(run: Run, step: int, finite: bool, batch: Batch) -> bool:
    """Whether the loss is finite on every rank; if not, on_nonfinite=stop raises a UserError on all of them."""
    if not run.engine.sum_over_ranks(torch.tensor(float(not finite))):
        return True
    if run.config.on_nonfinite == "stop":
        clips = gather_objects([] if finite else list(batch.ids))
        where = "; ".join(f"rank {rank}: {', '.join(ids)}" for rank, ids in enumerate(clips) if ids)
        raise UserError(f"step {step}: the loss is not finite on {where}; {NONFINITE_HINT}")
    return False


def validate(run: Run, done: int) -> None:
    """Held-out losses and videos after `done` steps, if they are due."""
    config, last, log = run.config.validation, done == run.config.steps, run.log
    if run.heldout and (done % config.every == 0 or last):
        run.watchdog.begins(done - 1, "validating")
        losses = run.heldout.measure()
        log.write(done, losses)
        log.say(f"step {done}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    if run.videos and (done % config.videos.every == 0 or last):
        began = time.perf_counter()
        with run.watchdog.rank0_section(done - 1, "making videos") as alive:
            world = averaged_world(run.config, run.checked.world, run.engine, run.ema)
            if world is not None:
                made = run.videos.make(world, done, alive)
                log.write(
                    done, {f"video/{name}": str(path.relative_to(run.config.folder)) for name, path in made.items()}
                )
        log.say(f"step {done}: videos in {run.videos.folder}, training waited {time.perf_counter() - began:.1f} s")


def save(run: Run, done: int, last: bool) -> None:
    """A checkpoint after `done` steps."""
    config, ranks, began = run.config, run.engine.accelerator.num_processes, time.perf_counter()
    run.watchdog.begins(done - 1, "saving")
    folder = run.saver.save(Position(done, ranks, config.batch, config.accumulation, config.seed, run.checked.data))
    if last:  # no rank ends before it is there: if one is lost until then, all have to begin again
        with run.watchdog.rank0_section(done - 1, "writing the last checkpoint"):
            run.saver.finish()
        if not all(gather_objects(run.saver.fault is None)):
            raise run.saver.fault or FileError(f"another rank cannot write {folder}, and says why")
    if run.saver.fault is None:  # else it has been said, or `check` raises it
        verb = "saving" if run.saver.background and not last else "saved"
        run.log.say(f"step {done}: {verb} {folder}, training waited {time.perf_counter() - began:.1f} s")


@contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """Turns too little memory into a UserError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        raise UserError(
            f"out of memory on rank {os.environ.get('RANK', '0')} with batch={config.batch}: {text}; lower batch and "
            "raise accumulation, or try model.checkpoint_every=1, more processes or engine.stage=3"
        ) from error
