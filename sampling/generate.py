"""A prompt picture and an action script in, a video with a keyboard and mouse overlay and a contact sheet out."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configs import storage, within
from configs.errors import MissingFileError, UserError
from configs.files import require_no_folder
from configs.game import GameConfig
from data_pipeline.overlay import Overlay, enlarge
from data_pipeline.pictures import read_picture
from data_pipeline.readers.recording import VIDEOS
from data_pipeline.types import Actions
from data_pipeline.video import fit_frame, read_frames, to_video, write_video
from model.action_dit import CompileMode
from model.layout import CHUNK_FRAMES
from model.world import WorldModel, read_world_config
from sampling.config import SamplingConfig, check_denoising
from sampling.denoising import Denoising
from sampling.play import play
from sampling.scripts import Scripted, is_file, read_script
from sampling.video_grid import Tile, write_sheet

SHEET_TILES = 36  # pictures of the contact sheet at most


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """`python -m sampling generate <checkpoint>`."""

    prompt: str  # an image, or a video of which `prompt_frame` is taken
    out: str  # .mp4; the contact sheet gets the same name with .png
    actions: str = "random"  # random, words (forward+turn_left:36,idle:12), a .csv or a .json file
    frames: int = 81  # at the game's frame rate, the prompt included
    steps: int = 8  # Euler steps per chunk or block
    few_steps: tuple[int, ...] = ()  # causal models: instead of steps the list of a few-step model: [1000,666,333]
    context_noise: float | None = None  # causal models: noise of finished blocks in the caches; null: the model's own
    prompt_frame: int = within(0, 1 << 62, 0)
    prompt_frames: int = within(1, 1_000_000, 1)  # of the prompt video, in whole pieces; actions begin with theirs
    compile: CompileMode = "no"  # torch.compile of the model's blocks: worth its minutes for a long video

    def __post_init__(self) -> None:
        _ = self.denoising, self.scripted  # checks of their own
        if Path(self.out).suffix.lower() != ".mp4":
            raise UserError(f"out={self.out} must end in .mp4")
        if self.prompt_frames > self.frames:
            raise UserError(f"prompt_frames={self.prompt_frames} is more than frames={self.frames}")

    @property
    def denoising(self) -> Denoising:
        return Denoising(self.steps, self.few_steps, self.context_noise, self.guidance)

    @property
    def scripted(self) -> Scripted:
        return Scripted(self.frames, self.seed, self.mouse_deg)


def generate(config: GenerateConfig) -> None:
    """Play an action script from a prompt picture: <checkpoint> prompt=frame.png actions=random out=demo.mp4"""
    out, sheet = storage.path(config.out), storage.path(config.out).with_suffix(".png")
    require_no_folder([config.out, sheet])
    script = config.actions if is_file(config.actions) else None
    checkpoint = config.find([config.out, sheet], prompt=config.prompt, actions=script)
    trained = read_world_config(checkpoint)
    game = trained.game
    check_denoising(config.denoising, trained, checkpoint)
    actions = read_script(config.actions, game.action_space, config.scripted)
    prompt = read_prompt(config.prompt, config.prompt_frame, game, config.prompt_frames)
    world = config.load(checkpoint)
    world.dit.compile_blocks(config.compile)
    started, tiles = time.perf_counter(), list[Tile]()
    title = f"{game.name}: {config.frames} frames, actions {config.actions}, seed {config.seed}, {config.steps} steps"
    with storage.writing_folder(out.parent, last=sheet.name) as folder:
        write_video(folder / out.name, _drawn_frames(world, prompt, actions, config, tiles), game.fps)
        took_s = time.perf_counter() - started
        write_sheet(folder / sheet.name, tiles, title)
    length = f"{config.frames} frames ({config.frames / game.fps:.1f} s of play)"
    print(f"{out}: {length} in {took_s:.1f} s, {took_s / config.frames:.3f} s per frame; contact sheet {sheet}")


def _drawn_frames(
    world: WorldModel, prompt: np.ndarray, actions: Actions, config: GenerateConfig, tiles: list[Tile]
) -> Iterator[np.ndarray]:
    """The frames of the video as they come; some of them, the very first and last too, go to `tiles`."""
    overlay = Overlay(world.game.action_space, *enlarge(prompt[0]).shape[:2])
    count = min(math.ceil(config.frames / CHUNK_FRAMES), SHEET_TILES)
    shown, frame = set(np.linspace(0, config.frames - 1, count).round().astype(int).tolist()), 0
    start = to_video(torch.from_numpy(prompt)[None])
    start = start if len(prompt) > 1 else start[:, :, 0]
    rows = torch.from_numpy(actions.keyboard)[None], torch.from_numpy(actions.mouse)[None]
    with tqdm(total=config.frames, desc="generate", unit="frame") as progress:
        for piece in play(world, start, rows, [config.seed], config.denoising):
            for picture in piece[0].cpu().numpy():
                drawn = overlay.draw(enlarge(picture), actions.keyboard[frame], actions.mouse[frame])
                if frame in shown:
                    label = f"frame {frame}" if frame else "the prompt"
                    tiles.append(Tile(drawn, label, f"{frame / world.game.fps:.2f} s"))
                yield drawn
                frame += 1
            progress.update(piece.shape[1])


def read_prompt(path: str, frame: int, game: GameConfig, count: int = 1) -> np.ndarray:
    """Pictures (n h w 3) uint8 of the game's size: the image `path`, or `count` frames of a video from `frame` on."""
    if not storage.path(path).is_file():
        raise MissingFileError(f"no prompt {path}; give an image or a video")
    if Path(path).suffix.lower() in VIDEOS:
        recorded = islice(read_frames(path), frame, frame + count)
    elif count == 1:
        recorded = [read_picture(path)]
    else:
        raise UserError(f"prompt_frames={count} needs a video as the prompt, not {path}")
    pictures = [fit_frame(picture, game.height, game.width) for picture in recorded]
    if len(pictures) < count:
        raise UserError(f"{path} is too short for prompt_frame={frame} and prompt_frames={count}")
    return np.stack(pictures)
