"""Rollouts to look at: videos in a grid, and contact sheets with one picture per chunk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs.game import GameConfig
from data_pipeline.overlay import Overlay, enlarge
from data_pipeline.types import Actions
from data_pipeline.video import write_video
from model.layout import CHUNK_FRAMES
from sampling.contact_sheet import Tile, draw_sheet, write_sheet
from sampling.trajectories import Prompt, Replay

SHOWN_PROMPTS = 3  # of the replays, in the video and the sheet
REPLAY_WIDTH, SHEET_WIDTH = 480, 200  # px of one picture of a video with two columns, of a sheet
HELD_WIDTH = 320  # px of one picture of the video with four columns


@dataclass(frozen=True)
class Panel:
    """One rollout or recording with its actions."""

    label: str
    frames: np.ndarray  # (n h w 3) uint8
    actions: Actions  # n rows


@dataclass(frozen=True)
class VideoGrid:
    """Panels that run at the same time."""

    name: str  # of the files, without suffix
    title: str
    sentence: str  # what it shows
    panels: Sequence[Panel]
    columns: int
    width: int  # px of one picture of the video
    given: int = CHUNK_FRAMES  # frames at the beginning that were not made


def replay_grid(prompts: Sequence[Prompt], replay: Replay) -> VideoGrid:
    """What really happened beside what was generated from the same 9 frames and actions."""
    panels, shown = [], prompts[:SHOWN_PROMPTS]
    for prompt, generated in zip(shown, replay.from_context, strict=False):
        made = np.concatenate([prompt.frames[:CHUNK_FRAMES], generated])
        panels.append(Panel("real play", prompt.frames, prompt.actions))
        panels.append(Panel("generated", made, prompt.actions))
    names = "; ".join(prompt.name for prompt in shown)
    sentence = f"Left what was recorded, right what the model makes of the same 9 frames and actions ({names})."
    return VideoGrid("replay", "Real play and the model's", sentence, panels, 2, REPLAY_WIDTH)


def held_grid(prompt: Prompt, made: Mapping[str, np.ndarray], game: GameConfig, mouse_deg: float) -> VideoGrid:
    """Every constant action from the 9 frames of `prompt`, the first of the rollouts `made`."""
    panels = []
    for command, rollouts in made.items():
        frames = np.concatenate([prompt.frames[:CHUNK_FRAMES], rollouts[0]])
        actions = prompt.with_constant_action(command, game, len(rollouts[0]), mouse_deg)
        panels.append(Panel(command.replace("_", " "), frames, actions))
    sentence = "The same 9 frames and the same noise, another command held in each picture."
    return VideoGrid("held", f"One command held, from {prompt.name}", sentence, panels, 4, HELD_WIDTH)


def write_grid(out: Path, grid: VideoGrid, game: GameConfig) -> None:
    """Writes `<name>.mp4` and `<name>.png`, the contact sheet, into `out`."""
    write_video(out / f"{grid.name}.mp4", _video_frames(grid, game), game.fps, crf=20)
    last_frames = range(CHUNK_FRAMES - 1, len(grid.panels[0].frames), CHUNK_FRAMES)
    overlay = _overlay(grid, game, SHEET_WIDTH)
    tiles = [_tile(grid, panel, frame, overlay, game.fps) for panel in grid.panels for frame in last_frames]
    write_sheet(out / f"{grid.name}.png", tiles, grid.title, len(last_frames), SHEET_WIDTH)


def _video_frames(grid: VideoGrid, game: GameConfig) -> Iterator[np.ndarray]:
    overlay = _overlay(grid, game, grid.width)
    for frame in tqdm(range(len(grid.panels[0].frames)), desc=f"video {grid.name}", unit="frame", disable=None):
        tiles = [_tile(grid, panel, frame, overlay, game.fps) for panel in grid.panels]
        yield np.asarray(draw_sheet(tiles, grid.title, grid.columns, grid.width))


def _overlay(grid: VideoGrid, game: GameConfig, width: int) -> Overlay:
    return Overlay(game.action_space, *enlarge(grid.panels[0].frames[0], width).shape[:2])


def _tile(grid: VideoGrid, panel: Panel, frame: int, overlay: Overlay, fps: float) -> Tile:
    picture = enlarge(panel.frames[frame], overlay.width)
    drawn = overlay.draw(picture, panel.actions.keyboard[frame], panel.actions.mouse[frame])
    after = frame - grid.given + 1
    return Tile(drawn, panel.label, "given" if after <= 0 else f"+{after / fps:.1f} s")
