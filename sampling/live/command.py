"""`python -m sampling play`: a page on which anybody can walk through a world, or a script without one."""

import pkgutil
import time

import numpy as np
import torch
from tqdm import tqdm

from configs import storage
from configs.errors import UserError
from data_pipeline.readers.keys import mouse_rows
from data_pipeline.types import Actions
from data_pipeline.video import to_video
from model.world import WorldModelConfig, read_world_config
from sampling.config import check_denoising
from sampling.live.config import PlayConfig, read_starts
from sampling.live.protocol import MOST_KEYS, describe_denoising
from sampling.live.recording import DIGITS, Recording, to_jpeg
from sampling.play import play
from sampling.scripts import Scripted, read_script


def play_world(config: PlayConfig) -> None:
    """Walk through a world in the browser: <checkpoint> prompt=picture.png; script= record= play without one"""
    outs = [config.record] if config.record else []
    checkpoint = config.find(outs, prompt=config.prompt or None)
    trained = read_world_config(checkpoint)
    check_denoising(config.denoising, trained, checkpoint)
    if len(trained.game.action_space.keys) > MOST_KEYS:
        raise UserError(f"{checkpoint} has {len(trained.game.action_space.keys)} keys; {MOST_KEYS} can be played")
    starts = read_starts(checkpoint, trained, config)
    if config.script:
        _play_script(config, checkpoint, trained, starts[0])
        return
    try:
        serve = pkgutil.resolve_name("sampling.live.server:serve")
    except ModuleNotFoundError as error:
        raise UserError(f"playing in a browser needs {error.name}: pip install 'worldloom[play]'") from error
    serve(config, checkpoint, trained, starts)


def _play_script(config: PlayConfig, checkpoint: str, trained: WorldModelConfig, start: np.ndarray) -> None:
    """Plays the script from the picture `start` (h w 3) and writes the episode."""
    space = trained.game.action_space
    actions = read_script(config.script, space, Scripted(config.frames, config.seed, config.mouse_deg))
    degrees = np.zeros((len(actions), 2))
    if space.mouse:  # as they will stand in actions.csv
        degrees = (actions.mouse.astype(np.float64) * space.mouse_unit_deg).round(DIGITS)
    actions = Actions(actions.keyboard, mouse_rows(space, degrees))
    world = config.load(checkpoint)
    recording = Recording(trained.game, start, config.seed, world.precision)
    recording.note(describe_denoising(config.denoising))
    image = to_video(torch.from_numpy(start)[None, None])[:, :, 0]
    rows = torch.from_numpy(actions.keyboard)[None], torch.from_numpy(actions.mouse)[None]
    started = time.perf_counter()
    for piece in tqdm(play(world, image, rows, [config.seed], config.denoising), desc="play", unit="block"):
        frames, first = piece[0].cpu().numpy(), len(recording)
        part = slice(first, first + len(frames))
        recording.add(frames, [to_jpeg(frame) for frame in frames], actions.keyboard[part], degrees[part])
    took_s = time.perf_counter() - started
    out = storage.join(config.record, f"play_{time.strftime('%Y%m%d_%H%M%S')}")
    recording.write(out)
    print(f"{out}: {len(recording)} frames, {len(recording) / took_s:.1f} per second")
