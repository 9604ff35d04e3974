"""The training loop, straight down."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from configs import load_config
from configs.files import write_text
from data_pipeline.stream import Stream, load_manifest, require_action_space
from data_pipeline.types import Batch, Manifest
from model.action_dit import ActionDiT
from model.codec import codec_hash
from model.flow import FlowMatch
from model.weights import load_into, open_weights
from sampling.world_model import WorldModelConfig, newest_checkpoint, read_world_config
from train.checkpoint import (
    Position,
    find_resumable,
    fit_to_ranks,
    load_checkpoint,
    manifest_digest,
    read_position,
    sole_run,
)
from train.config import STOPPED, TrainConfig
from train.ema import Ema
from train.engine import Engine, make_engine, start_accelerator
from train.evaluate import Validation
from train.log import Interval, Log, StepFigures, describe, per_rank
from train.objectives import Objective, check_objective, make_objective
from train.objectives.draws import make_draws
from train.optim import learning_rate
from train.save import Saver
from train.watchdog import Watchdog


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (Slurm's warning) or Ctrl-C; the loop finishes its step, saves and returns."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

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
    data: str  # digest of the manifest
    watchdog: Watchdog
    saver: Saver
    validation: Validation | None


def train(words: list[str]) -> None:
    """Train a world model on latent shards; run again, it goes on from its newest complete checkpoint."""
    asked = load_config(TrainConfig, words)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    checked = check_run(asked, ranks)
    config, world, resumed, start = checked.config, checked.world, checked.resumed, checked.start
    stream = Stream(config.manifest, config.batch, config.seed, rank, ranks, config.workers)
    stop = StopRequest()
    accelerator = start_accelerator(config)
    with sole_run(Path(config.out)) if rank == 0 else nullcontext():
        if rank == 0:
            (Path(config.out) / STOPPED).unlink(missing_ok=True)
        model = ActionDiT(config.model, torch.Generator().manual_seed(config.seed))
        if checked.init:
            load_into(model, open_weights(checked.init))
        model.compile_blocks(config.engine.compile)
        engine = make_engine(accelerator, model, config)
        ema = Ema(engine, config.ema_decay)
        if resumed:
            load_checkpoint(engine, ema, resumed)
        flow = FlowMatch(config.flow)
        validation = Validation(config, engine, flow) if config.validation.manifest else None
        saver = Saver(engine, ema, config, world)
        watchdog = Watchdog(Path(config.out), rank, ranks, config.engine.timeout_s)
        run = Run(config, checked.objective, flow, engine, ema, stop, checked.data, watchdog, saver, validation)
        with closing(Log(config, start, accelerator.is_main_process)) as log:
            if resumed:
                log.say(f"resumed from {resumed} at step {start}")
            if config != asked:
                log.say(f"on {ranks} ranks the same clips per step are batch {config.batch} x {config.accumulation}")
            with closing(stream.batches(start * config.accumulation)) as batches, watchdog.watching(), memory(config):
                run_steps(run, range(start, config.steps), batches, log)
            if start >= config.steps:
                log.say(f"nothing to do: {resumed} has all {config.steps} steps")
        engine.shutdown()


@dataclass(frozen=True)
class CheckedRun:
    """A run whose parts belong together, before any process group is there."""

    config: TrainConfig  # with the batch and accumulation that the ranks need
    world: WorldModelConfig
    objective: Objective
    data: str  # digest of the manifest
    init: Path | None  # weights to start from
    resumed: Path | None  # checkpoint to go on from
    start: int  # step


def check_run(config: TrainConfig, ranks: int) -> CheckedRun:
    """Everything that can be found wrong without starting: raises ValueError or OSError in one line."""
    manifest = load_manifest(config.manifest)
    world = describe_world(config, manifest)
    objective, data = make_objective(config.objective), manifest_digest(manifest)
    check_objective(objective, config.model, manifest.layout, manifest.clip_latents)
    resumed, start = find_resumable(Path(config.out), world), 0
    if resumed:
        position = read_position(resumed)
        config, start = fit_to_ranks(config, data, position, ranks, resumed), position.step
    init = initial_weights(config, manifest) if config.init else None
    return CheckedRun(config, world, objective, data, init, resumed, start)


def run_steps(run: Run, steps: range, batches: Iterator[Batch], log: Log) -> None:
    """Trains `steps`, or until a stop is asked for; figures, validation and checkpoints when they are due."""
    config, engine = run.config, run.engine
    ranks, rank = engine.accelerator.num_processes, engine.accelerator.process_index
    interval = Interval(ranks * config.batch * config.accumulation, ranks)
    for step in steps:
        engine.set_learning_rate(rate := learning_rate(config.optim, step, config.steps))
        figures, forward_s, waited_s = StepFigures(), 0.0, interval.waited_s
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
                forward_s += time.perf_counter() - began
                if spoiled(run, step, loss, batch):
                    interval.skipped += 1
                    continue
                engine.backward(loss)
            figures.add(part)
        if figures.sums[1].any():  # else the step was skipped
            run.ema.update(step)
            if not math.isfinite(engine.grad_norm):
                raise ValueError(
                    f"step {step}: the gradient's norm is {engine.grad_norm}, and the weights are spoiled; the newest "
                    f"checkpoint of {config.out} is from before it: lower the learning rate, or look at the clips"
                )
        # One exchange tells every rank the figures of all and whether any of them was asked to stop.
        mine = per_rank(rank, ranks, forward_s, interval.waited_s - waited_s)
        told = (figures.sums.flatten(), mine.flatten(), torch.tensor([float(run.stop.asked)]))
        total = engine.sum_over_ranks(torch.cat(told)).split([len(part) for part in told])
        sums, by_rank, stopping = total[0].reshape(2, -1), total[1].reshape(mine.shape), bool(total[2] > 0)
        done, last = step + 1, step + 1 == config.steps or stopping
        interval.add(sums, by_rank)
        log.advance(describe(sums).get("loss", math.nan), interval.data_wait)
        if done % config.log_every == 0 or last:
            log.write(done, {**interval.figures(), "grad_norm": engine.grad_norm, "learning_rate": rate})
            interval.restart()
        with interval.paused():
            run.watchdog.begins(step, "validating or saving")
            if run.validation and (done % config.validation.every == 0 or done == config.steps):
                log.write(done, found := run.validation.measure())
                log.say(f"step {done}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            if done % config.checkpoint.every == 0 or last:
                began = time.perf_counter()
                position = Position(done, ranks, config.batch, config.accumulation, config.seed, run.data)
                folder = run.saver.save(position)
                run.saver.wait() if last else run.saver.check()
                going_on = config.checkpoint.background and not last
                took = f"{time.perf_counter() - began:.1f} s"
                log.say(f"step {done}: {'saving' if going_on else 'saved'} {folder}, training waited {took}")
            run.saver.check()
        if stopping:
            if engine.accelerator.is_main_process:
                write_text(Path(config.out) / STOPPED, f"step {done}\n")
            log.say(f"stopped at step {done} of {config.steps} as asked; the same command goes on from here")
            return


@contextmanager
def memory(config: TrainConfig) -> Iterator[None]:
    """Within the block, memory that is not there is a ValueError of one line: what was asked for, what to lower."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in said:
            raise
        raise ValueError(
            f"out of memory on rank {os.environ.get('RANK', '0')} with batch={config.batch}: {said}; lower batch and "
            "raise accumulation by as much, or try model.checkpoint_every=1, engine.stage=3, engine.offload=optimizer"
        ) from error


def spoiled(run: Run, step: int, loss: Tensor, batch: Batch) -> bool:
    """Whether the loss is NaN or infinite on any rank, so that this step is to be skipped on all of them.

    Raises ValueError in one line, on every rank, if that is to stop the run: nothing of it has reached the weights.
    """
    ranks, rank = run.engine.accelerator.num_processes, run.engine.accelerator.process_index
    flags = torch.zeros(ranks)
    flags[rank] = float(not torch.isfinite(loss))
    bad = run.engine.sum_over_ranks(flags).nonzero().flatten().tolist()
    if bad and run.config.on_nonfinite == "stop":
        clips = run.engine.gather_objects(list(batch.ids))
        where = "; ".join(f"rank {one}: {', '.join(clips[one])}" for one in bad)
        raise ValueError(
            f"step {step}: the loss is not finite on {where}; the newest checkpoint of {run.config.out} is from before "
            "it: look at these clips, lower the learning rate, or say on_nonfinite=skip"
        )
    return bool(bad)


def describe_world(config: TrainConfig, manifest: Manifest) -> WorldModelConfig:
    """What the sampler will need; raises if manifest, codec and model do not belong together."""
    space, action = manifest.game.action_space, config.model.action
    found = codec_hash(config.codec)
    if found != manifest.codec_hash:
        raise ValueError(f"{config.manifest} was made by codec {manifest.codec_hash}, {config.codec} is {found}")
    if action and action.enable_keyboard and action.keyboard_dim_in != len(space.keys):
        raise ValueError(
            f"model.action.keyboard_dim_in={action.keyboard_dim_in}, but {space.name!r} has {len(space.keys)} keys "
            f"({', '.join(space.keys)})"
        )
    if action and action.enable_mouse and not space.mouse:
        raise ValueError(f"model.action.enable_mouse=true, but action space {space.name!r} has no mouse")
    causal = config.model.causal
    for name, ours, theirs in (
        ("vision", config.model.vision, manifest.vision),
        ("unknown", causal.unknown if causal else "zeros", manifest.unknown),
    ):
        if ours != theirs:
            where = "model.vision" if name == "vision" else "model.causal.unknown"
            raise ValueError(f"{where}={ours}, but the clips of {config.manifest} were encoded with {name}={theirs}")
    return WorldModelConfig(config.model, config.flow, manifest.game, manifest.layout, config.codec, found)


def initial_weights(config: TrainConfig, manifest: Manifest) -> Path:
    """The weights file that `config.init` names; raises if it is of another model or action space."""
    assert config.init
    checkpoint = newest_checkpoint(config.init)
    require_action_space(manifest, read_world_config(checkpoint).game.action_space, str(checkpoint))
    return checkpoint / f"{config.init_weights}.safetensors"
