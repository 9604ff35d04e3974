"""The rollouts that were judged, to look at: videos in a grid, and sheets with one picture per chunk."""

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
from sampling.scripts import Scripted, read_script
from sampling.trials import Replay, Start

SHOWN_STARTS = 3  # of the replays, in the video and the sheet
FILM_WIDTH, SHEET_WIDTH = 480, 200  # px of one picture of a video with two columns, of a sheet
HELD_FILM_WIDTH = 320  # px of one picture of the video with four columns


@dataclass(frozen=True)
class Take:
    """One rollout or recording with its actions, what was given first."""

    label: str
    frames: np.ndarray  # (n h w 3) uint8
    actions: Actions  # n rows


@dataclass(frozen=True)
class Film:
    """A grid of takes that run at the same time."""

    name: str  # of the files, without suffix
    title: str
    sentence: str  # what it shows
    takes: Sequence[Take]
    columns: int
    width: int  # px of one picture of the video
    given: int = CHUNK_FRAMES  # frames at the beginning that were not made


def replay_film(starts: Sequence[Start], replay: Replay) -> Film:
    """What really happened beside what was generated from the same 9 frames and actions."""
    takes = []
    for i, start in enumerate(starts[:SHOWN_STARTS]):
        made = np.concatenate([start.frames[:CHUNK_FRAMES], replay.from_context[i]])
        takes.append(Take("real play", start.frames, start.actions))
        takes.append(Take("generated", made, start.actions))
    names = "; ".join(start.name for start in starts[:SHOWN_STARTS])
    sentence = f"Left what was recorded, right what the model makes of the same 9 frames and actions ({names})."
    return Film("replay", "Real play and the model's", sentence, takes, 2, FILM_WIDTH)


def held_film(starts: Sequence[Start], made: Mapping[str, np.ndarray], game: GameConfig, mouse_deg: float) -> Film:
    """Every held command from the first start's 9 frames."""
    start, takes = starts[0], []
    for command, rollouts in made.items():
        frames = np.concatenate([start.frames[:CHUNK_FRAMES], rollouts[0]])
        held = read_script(command, game.action_space, Scripted(len(rollouts[0]), 0, mouse_deg))
        before = start.actions[:CHUNK_FRAMES]
        actions = Actions(np.concatenate([before.keyboard, held.keyboard]), np.concatenate([before.mouse, held.mouse]))
        takes.append(Take(command.replace("_", " "), frames, actions))
    sentence = "The same 9 frames and the same noise, another command held in each picture."
    return Film("held", f"One command held, from {start.name}", sentence, takes, 4, HELD_FILM_WIDTH)


def write_film(out: Path, film: Film, game: GameConfig) -> None:
    """Writes `<name>.mp4` and `<name>.png`, the sheet, into `out`."""
    write_video(out / f"{film.name}.mp4", _film_frames(film, game), game.fps, crf=20)
    last_frames = range(CHUNK_FRAMES - 1, len(film.takes[0].frames), CHUNK_FRAMES)
    overlay = _overlay(film, game, SHEET_WIDTH)
    tiles = [_tile(film, take, frame, overlay, game.fps) for take in film.takes for frame in last_frames]
    write_sheet(out / f"{film.name}.png", tiles, film.title, len(last_frames), SHEET_WIDTH)


def _film_frames(film: Film, game: GameConfig) -> Iterator[np.ndarray]:
    overlay = _overlay(film, game, film.width)
    for frame in tqdm(range(len(film.takes[0].frames)), desc=f"film {film.name}", unit="frame", disable=None):
        tiles = [_tile(film, take, frame, overlay, game.fps) for take in film.takes]
        yield np.asarray(draw_sheet(tiles, film.title, film.columns, film.width))


def _overlay(film: Film, game: GameConfig, width: int) -> Overlay:
    return Overlay(game.action_space, *enlarge(film.takes[0].frames[0], width).shape[:2])


def _tile(film: Film, take: Take, frame: int, overlay: Overlay, fps: float) -> Tile:
    picture = enlarge(take.frames[frame], overlay.width)
    drawn = overlay.draw(picture, take.actions.keyboard[frame], take.actions.mouse[frame])
    after = frame - film.given + 1
    return Tile(drawn, take.label, "given" if after <= 0 else f"+{after / fps:.1f} s")
