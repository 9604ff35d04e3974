"""The training loop, straight down."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch

from configs import load_config
from data_pipeline.stream import Stream, load_manifest
from data_pipeline.types import Manifest
from model.action_dit import ActionDiT
from model.codec import codec_hash
from model.flow import FlowMatch
from model.weights import load_into, load_weights
from sampling.scores import SIGMA_BINS
from sampling.world_model import WorldModelConfig, newest_checkpoint, read_world_config
from train.checkpoint import Position, find_resumable, load_checkpoint, save_checkpoint
from train.config import TrainConfig
from train.ema import Ema
from train.engine import make_engine, start_accelerator
from train.evaluate import Validation
from train.log import Log, StepFigures, describe
from train.objectives import make_objective
from train.objectives.draws import make_draws
from train.optim import learning_rate, make_optimizer


class StopRequest:
    """Set by SIGTERM or Ctrl-C; the loop finishes its step, saves and returns."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def train(words: list[str]) -> None:
    """Train a world model on latent shards; run again, it goes on from its newest complete checkpoint."""
    config = load_config(TrainConfig, words)
    manifest = load_manifest(config.manifest)
    world = describe_world(config, manifest)
    objective, flow = make_objective(config.objective), FlowMatch(config.flow)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    stream = Stream(config.manifest, config.batch, config.seed, rank, ranks, config.workers)
    start_from = initial_weights(config, world) if config.init else None
    resumed = find_resumable(Path(config.out), world)
    stop = StopRequest()
    accelerator = start_accelerator(config)
    model = ActionDiT(config.model, torch.Generator().manual_seed(config.seed))
    if start_from:
        load_into(model, load_weights(start_from))
    engine = make_engine(accelerator, model, make_optimizer(model, config.optim), config)
    ema = Ema(engine, config.ema_decay)
    start = load_checkpoint(engine, ema, config, resumed).step if resumed else 0
    log = Log(config, start, accelerator.is_main_process)
    if resumed:
        log.say(f"resumed from {resumed} at step {start}")
    validation = Validation(config, engine, flow) if config.validation.manifest else None
    batches = stream.batches(start * config.accumulation)
    last_log = time.perf_counter()
    waited_s, since_log, sums = 0.0, 0, torch.zeros(2, SIGMA_BINS)
    for step in range(start, config.steps):
        engine.set_learning_rate(rate := learning_rate(config.optim, step, config.steps))
        figures = StepFigures()
        for micro in range(config.accumulation):
            before = time.perf_counter()
            batch = next(batches).to(accelerator.device)
            waited_s += time.perf_counter() - before
            micro_step = step * config.accumulation + micro
            draws = make_draws(config.seed, micro_step, (micro_step * ranks + rank) * config.batch, config.batch)
            with engine.accumulate():
                loss, part = objective.loss(engine.model, flow, batch, step / config.steps, draws)
                engine.backward(loss)
            figures.add(part)
        ema.update(step)
        flag = torch.tensor([float(stop.asked)])
        total = engine.sum_over_ranks(torch.cat([figures.sums.flatten(), flag]))
        stopping, sums, since_log = bool(total[-1] > 0), sums + total[:-1].reshape(2, -1), since_log + 1
        done, last = step + 1, step + 1 == config.steps or stopping
        log.advance(describe(total[:-1].reshape(2, -1))["loss"], waited_s / (time.perf_counter() - last_log))
        if done % config.log_every == 0 or last:
            took_s = time.perf_counter() - last_log
            clips = since_log * ranks * config.batch * config.accumulation
            speed = {"s/step": took_s / since_log, "clips/s": clips / took_s, "data_wait": waited_s / took_s}
            log.write(done, {**describe(sums), "grad_norm": engine.grad_norm, "learning_rate": rate, **speed})
            waited_s, since_log, sums = 0.0, 0, torch.zeros(2, SIGMA_BINS)
            last_log = time.perf_counter()
        if validation and (done % config.validation.every == 0 or done == config.steps):
            log.write(done, found := validation.measure())
            log.say(f"step {done}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            last_log = time.perf_counter()
        if done % config.checkpoint.every == 0 or last:
            before = time.perf_counter()
            folder = save_checkpoint(engine, ema, config, world, position_at(done, config, ranks))
            log.say(f"step {done}: saved {folder} in {time.perf_counter() - before:.1f} s")
            last_log += time.perf_counter() - before
        if stopping:
            log.say(f"stopped at step {done} of {config.steps} as asked; the same command goes on from here")
            break
    if start >= config.steps:
        log.say(f"nothing to do: {resumed} has all {config.steps} steps")
    batches.close()
    log.close()
    engine.shutdown()


def position_at(step: int, config: TrainConfig, ranks: int) -> Position:
    return Position(step, ranks, config.batch, config.accumulation)


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
    return WorldModelConfig(config.model, config.flow, manifest.game, manifest.layout, config.codec, found)


def initial_weights(config: TrainConfig, world: WorldModelConfig) -> Path:
    """The weights file that `config.init` names; raises if it is of another model or action space."""
    assert config.init
    checkpoint = newest_checkpoint(config.init)
    other = read_world_config(checkpoint)
    if other.game.action_space.hash != world.game.action_space.hash:
        raise ValueError(
            f"{checkpoint} knows action space {other.game.action_space}, the manifest has {world.game.action_space}"
        )
    return checkpoint / f"{config.init_weights}.safetensors"
