"""A prompt picture and an action script in, a video with a keyboard and mouse overlay and a contact sheet out."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from configs import load_config
from data_pipeline.types import CHUNK_FRAMES, Actions, GameConfig
from data_pipeline.video import fit_frame, read_frames, write_video
from sampling.chunked import rollout, to_video
from sampling.contact_sheet import Tile, write_sheet
from sampling.overlay import Overlay, enlarge
from sampling.scripts import Scripted, read_script
from sampling.world_model import Precision, Weights, WorldModel, load_world, newest_checkpoint, read_world_config

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")


@dataclass(frozen=True)
class GenerateConfig:
    """`python -m sampling generate <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    prompt: str  # an image, or a video of which `prompt_frame` is taken
    out: str  # .mp4; the contact sheet gets the same name with .png
    actions: str = "random"  # random, presets (forward+turn_left:36,idle:12), a .csv or a .json file
    frames: int = 81  # at the game's frame rate, the prompt included
    steps: int = 8  # Euler steps per chunk of 9 frames
    seed: int = 0
    prompt_frame: int = 0
    mouse_deg: float = 3.0  # degrees per frame of turn_left, look_up, ...
    weights: Weights = "ema"
    device: str = "cpu"
    precision: Precision = "fp32"  # of the DiT's weights

    def __post_init__(self) -> None:
        if self.frames < 1 or self.steps < 1 or self.seed < 0 or self.prompt_frame < 0:
            raise ValueError("frames and steps must be at least 1, seed and prompt_frame at least 0")
        if Path(self.out).suffix.lower() != ".mp4":
            raise ValueError(f"out={self.out} must end in .mp4")

    @property
    def chunks(self) -> int:
        return math.ceil(self.frames / CHUNK_FRAMES)


def generate(words: list[str]) -> None:
    """Play an action script from a prompt picture: <checkpoint> prompt=frame.png actions=random out=demo.mp4"""
    config = load_config(GenerateConfig, words)
    checkpoint = newest_checkpoint(config.checkpoint)
    game = read_world_config(checkpoint).game
    actions = read_script(config.actions, game.action_space, Scripted(config.frames, config.seed, config.mouse_deg))
    prompt = read_prompt(config.prompt, config.prompt_frame, game)
    world = load_world(checkpoint, config.weights, config.device, config.precision)
    started = time.perf_counter()
    out, tiles = Path(config.out), []
    write_video(out, _drawn_frames(world, prompt, actions, config, tiles), game.fps)
    took_s = time.perf_counter() - started
    sheet = out.with_suffix(".png")
    title = f"{game.name}: {config.frames} frames, actions {config.actions}, seed {config.seed}, {config.steps} steps"
    write_sheet(sheet, tiles, title)
    length = f"{config.frames} frames ({config.frames / game.fps:.1f} s of play)"
    print(f"{out}: {length} in {took_s:.1f} s, {took_s / config.frames:.3f} s per frame; contact sheet {sheet}")


def _drawn_frames(
    world: WorldModel, prompt: np.ndarray, actions: Actions, config: GenerateConfig, tiles: list[Tile]
) -> Iterator[np.ndarray]:
    """The frames of the video as they come; one of each chunk, the very first and last among them, goes to `tiles`."""
    padding = ((0, config.chunks * CHUNK_FRAMES - len(actions)), (0, 0))
    keyboard, mouse = (
        torch.from_numpy(np.pad(rows, padding, mode="edge"))[None].to(world.device)
        for rows in (actions.keyboard, actions.mouse)
    )
    start = to_video(torch.from_numpy(prompt)[None, None])[:, :, 0].to(world.device)
    overlay = Overlay(world.game.action_space, *enlarge(prompt).shape[:2])
    shown = set(np.linspace(0, config.frames - 1, config.chunks).round().astype(int).tolist())
    chunks = rollout(world, start, keyboard, mouse, [config.seed], config.steps)
    for chunk, made in enumerate(tqdm(chunks, total=config.chunks, desc="generate", unit="chunk")):
        for frame, picture in enumerate(made[0].cpu().numpy(), start=chunk * CHUNK_FRAMES):
            if frame == config.frames:
                break
            drawn = overlay.draw(enlarge(picture), actions.keyboard[frame], actions.mouse[frame])
            if frame in shown:
                label = f"chunk {chunk + 1}" if frame else "chunk 1: the prompt"
                tiles.append(Tile(drawn, label, f"{frame / world.game.fps:.2f} s"))
            yield drawn


def read_prompt(path: str, frame: int, game: GameConfig) -> np.ndarray:
    """A picture (h w 3) uint8 of the game's size: the image `path`, or frame number `frame` of the video `path`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompt {path}; give an image or a video")
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        count = 0
        for count, picture in enumerate(read_frames(path), start=1):
            if count == frame + 1:
                return fit_frame(picture, game.height, game.width)
        raise ValueError(f"{path} has {count} frames; prompt_frame={frame} must be below that")
    try:
        with Image.open(path) as image:
            picture = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow on a broken PNG
        raise ValueError(f"the prompt {path} is no image that can be read ({error})") from error
    return fit_frame(picture, game.height, game.width)
