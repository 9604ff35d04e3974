"""The training loop, straight down."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from configs import load_config
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
    read_position,
    save_checkpoint,
)
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine, make_engine, start_accelerator
from train.evaluate import Validation
from train.log import Interval, Log, StepFigures, describe
from train.objectives import Objective, check_objective, make_objective
from train.objectives.draws import make_draws
from train.optim import learning_rate


class StopRequest:
    """Set by SIGTERM or Ctrl-C; the loop finishes its step, saves and returns."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@dataclass(frozen=True)
class Run:
    """The parts of one training run, all of them ready."""

    config: TrainConfig
    world: WorldModelConfig
    objective: Objective
    flow: FlowMatch
    engine: Engine
    ema: Ema
    stop: StopRequest
    validation: Validation | None


def train(words: list[str]) -> None:
    """Train a world model on latent shards; run again, it goes on from its newest complete checkpoint."""
    config = load_config(TrainConfig, words)
    manifest = load_manifest(config.manifest)
    world = describe_world(config, manifest)
    objective, flow = make_objective(config.objective), FlowMatch(config.flow)
    check_objective(objective, config.model, manifest.layout, manifest.clip_latents)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    resumed, start, asked = find_resumable(Path(config.out), world), 0, config
    if resumed:
        position = read_position(resumed)
        config, start = fit_to_ranks(config, position, ranks, resumed), position.step
    stream = Stream(config.manifest, config.batch, config.seed, rank, ranks, config.workers)
    start_from = initial_weights(config, manifest) if config.init else None
    stop = StopRequest()
    accelerator = start_accelerator(config)
    model = ActionDiT(config.model, torch.Generator().manual_seed(config.seed))
    if start_from:
        load_into(model, open_weights(start_from))
    model.compile_blocks(config.engine.compile)
    engine = make_engine(accelerator, model, config)
    ema = Ema(engine, config.ema_decay)
    if resumed:
        load_checkpoint(engine, ema, resumed)
    validation = Validation(config, engine, flow) if config.validation.manifest else None
    run = Run(config, world, objective, flow, engine, ema, stop, validation)
    with closing(Log(config, start, accelerator.is_main_process)) as log:
        if resumed:
            log.say(f"resumed from {resumed} at step {start}")
        if config != asked:
            log.say(f"on {ranks} ranks the same clips per step are batch {config.batch} x {config.accumulation}")
        with closing(stream.batches(start * config.accumulation)) as batches:
            run_steps(run, range(start, config.steps), batches, log)
        if start >= config.steps:
            log.say(f"nothing to do: {resumed} has all {config.steps} steps")
    engine.shutdown()


def run_steps(run: Run, steps: range, batches: Iterator[Batch], log: Log) -> None:
    """Trains `steps`, or until a stop is asked for; figures, validation and checkpoints when they are due."""
    config, engine = run.config, run.engine
    ranks, rank = engine.accelerator.num_processes, engine.accelerator.process_index
    interval = Interval(clips_per_step=ranks * config.batch * config.accumulation)
    for step in steps:
        engine.set_learning_rate(rate := learning_rate(config.optim, step, config.steps))
        figures = StepFigures()
        for micro in range(config.accumulation):
            with interval.waiting():
                batch = next(batches).to(engine.accelerator.device)
            micro_step = step * config.accumulation + micro
            draws = make_draws(config.seed, step, (micro_step * ranks + rank) * config.batch, config.batch)
            with engine.accumulate():
                loss, part = run.objective.loss(engine.model, run.flow, batch, step / config.steps, draws)
                engine.backward(loss)
            figures.add(part)
        run.ema.update(step)
        # One exchange tells every rank the figures of all and whether any of them was asked to stop.
        total = engine.sum_over_ranks(torch.cat([figures.sums.flatten(), torch.tensor([float(run.stop.asked)])]))
        sums, stopping = total[:-1].reshape(2, -1), bool(total[-1] > 0)
        done, last = step + 1, step + 1 == config.steps or stopping
        interval.add(sums)
        log.advance(describe(sums)["loss"], interval.data_wait)
        if done % config.log_every == 0 or last:
            log.write(done, {**interval.figures(), "grad_norm": engine.grad_norm, "learning_rate": rate})
            interval.restart()
        with interval.paused():
            if run.validation and (done % config.validation.every == 0 or done == config.steps):
                log.write(done, found := run.validation.measure())
                log.say(f"step {done}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            if done % config.checkpoint.every == 0 or last:
                began = time.perf_counter()
                position = Position(done, ranks, config.batch, config.accumulation)
                folder = save_checkpoint(engine, run.ema, config, run.world, position)
                log.say(f"step {done}: saved {folder} in {time.perf_counter() - began:.1f} s")
        if stopping:
            log.say(f"stopped at step {done} of {config.steps} as asked; the same command goes on from here")
            return


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
