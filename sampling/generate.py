"""A prompt picture and an action script in, a video with a keyboard and mouse overlay and a contact sheet out."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.files import require_no_folder, require_other_files
from configs.game import GameConfig
from data_pipeline.overlay import Overlay, enlarge
from data_pipeline.pictures import read_picture
from data_pipeline.readers.recording import VIDEOS
from data_pipeline.types import Actions
from data_pipeline.video import fit_frame, read_frames, to_video, write_video
from model.action_dit import CompileMode
from model.flow import FlowMatch
from model.layout import CHUNK_FRAMES
from model.limits import require_device
from model.world import (
    Precision,
    Weights,
    WorldModel,
    WorldModelConfig,
    checkpoint_files,
    find_checkpoint,
    load_world,
    read_world_config,
)
from sampling.contact_sheet import Tile, write_sheet
from sampling.denoising import Denoising
from sampling.play import play
from sampling.scripts import Scripted, is_file, read_script

SHEET_TILES = 36  # pictures of the contact sheet at most


@dataclass(frozen=True)
class GenerateConfig:
    """`python -m sampling generate <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    prompt: str  # an image, or a video of which `prompt_frame` is taken
    out: str  # .mp4; the contact sheet gets the same name with .png
    actions: str = "random"  # random, words (forward+turn_left:36,idle:12), a .csv or a .json file
    frames: int = 81  # at the game's frame rate, the prompt included
    method: Literal["chunked", "streaming"] = "chunked"  # streaming: of a causal model, block after block with caches
    steps: int = 8  # Euler steps per chunk or block
    few_steps: tuple[int, ...] = ()  # streaming: instead of steps the list of a few-step model: [1000,666,333]
    context_noise: float | None = None  # streaming: noise level of finished blocks in the caches; null: the model's own
    guidance: float = 1.0  # by actions: above 1 the picture answers more clearly, at twice the passes
    prompt_frames: int = 1  # streaming: frames of the prompt video that begin the video; actions begin with theirs
    vision: str | None = None  # weights of CLIP's vision tower, for a model with vision
    codec: str | None = None  # the one that it was trained with, where it does not lie beside the checkpoint
    compile: CompileMode = "no"  # torch.compile of the model's blocks: worth its minutes for a long video
    seed: int = 0
    prompt_frame: int = 0
    mouse_deg: float = 3.0  # degrees per frame of turn_left, look_up, ...
    weights: Weights = "ema"
    device: str = "cpu"
    precision: Precision = "fp32"  # of the DiT's weights

    def __post_init__(self) -> None:
        _ = self.denoising, self.scripted  # checks of their own
        if not 1 <= self.prompt_frames <= self.frames or self.seed < 0 or self.prompt_frame < 0:
            raise UserError(
                f"prompt_frames={self.prompt_frames} must be from 1 to frames={self.frames}, seed and prompt_frame at "
                "least 0"
            )
        if Path(self.out).suffix.lower() != ".mp4":
            raise UserError(f"out={self.out} must end in .mp4")
        if self.method == "chunked" and (self.few_steps or self.context_noise is not None or self.prompt_frames != 1):
            raise UserError("few_steps, context_noise and prompt_frames belong to method=streaming")

    @property
    def denoising(self) -> Denoising:
        return Denoising(self.steps, self.few_steps, self.context_noise, self.guidance)

    @property
    def scripted(self) -> Scripted:
        return Scripted(self.frames, self.seed, self.mouse_deg)


def generate(config: GenerateConfig) -> None:
    """Play an action script from a prompt picture: <checkpoint> prompt=frame.png actions=random out=demo.mp4"""
    require_device(config.device)
    checkpoint = find_checkpoint(config.checkpoint)
    trained = read_world_config(checkpoint)
    check_method(config, trained, checkpoint)
    out, sheet = storage.path(config.out), storage.path(config.out).with_suffix(".png")
    require_other_outs(config, [config.out, sheet], checkpoint)
    game = trained.game
    actions = read_script(config.actions, game.action_space, config.scripted)
    prompt = read_prompt(config.prompt, config.prompt_frame, game, config.prompt_frames)
    world = load_world(checkpoint, config.weights, config.device, config.precision, config.vision, config.codec)
    world.dit.compile_blocks(config.compile)
    started, tiles = time.perf_counter(), list[Tile]()
    title = f"{game.name}: {config.frames} frames, actions {config.actions}, seed {config.seed}, {config.steps} steps"
    with storage.writing_folder(out.parent, last=sheet.name) as folder:
        write_video(folder / out.name, _drawn_frames(world, prompt, actions, config, tiles), game.fps)
        took_s = time.perf_counter() - started
        write_sheet(folder / sheet.name, tiles, title)
    length = f"{config.frames} frames ({config.frames / game.fps:.1f} s of play)"
    print(f"{out}: {length} in {took_s:.1f} s, {took_s / config.frames:.3f} s per frame; contact sheet {sheet}")


def check_method(config: GenerateConfig, trained: WorldModelConfig, checkpoint: str) -> None:
    """Refuses settings that the model of `checkpoint` does not take."""
    FlowMatch(trained.flow).warp(config.few_steps)  # which raises
    method = "chunked" if trained.model.causal is None else "streaming"
    if config.method != method:
        was = "not trained causally" if method == "chunked" else "trained causally, block after block"
        raise UserError(f"method={config.method}, but {checkpoint} was {was}; use method={method}")


def require_other_outs(config: GenerateConfig, outs: Sequence[str | Path], checkpoint: str) -> None:
    """Refuses to write video or sheet over what is read, or where a folder is."""
    require_no_folder(outs)
    read = {
        "prompt": config.prompt,
        "actions": config.actions if is_file(config.actions) else None,
        "vision": config.vision,
        "checkpoint": checkpoint_files(checkpoint),
        "codec": config.codec and storage.files_at(config.codec),
    }
    require_other_files(outs, read)


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
    """Pictures (n h w 3) uint8 of the game's size: the image `path`, or `count` frames of the video `path` from number
    `frame` on."""
    if not storage.path(path).is_file():
        raise MissingFileError(f"no prompt {path}; give an image or a video")
    if Path(path).suffix.lower() in VIDEOS:
        pictures = [fit_frame(one, game.height, game.width) for one in islice(read_frames(path), frame, frame + count)]
        if len(pictures) < count:
            raise UserError(
                f"{path} has too few frames for prompt_frame={frame} and prompt_frames={count}; give smaller ones"
            )
        return np.stack(pictures)
    if count != 1:
        raise UserError(f"prompt_frames={count} needs a video as the prompt, not {path}")
    return fit_frame(read_picture(path), game.height, game.width)[None]
