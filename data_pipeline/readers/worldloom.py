"""Worldloom's own recordings: a folder per episode with `video.mp4`, `actions.csv` and `episode.json`.

The video may be in any container that FFmpeg reads (`video.mkv`, `Video.MOV`).

`actions.csv` has one row per frame: `frame`, one column of 0 or 1 per key by its name, and `pitch_deg,yaw_deg`, how far
the view turns during the frame's interval (pitch > 0 up, yaw > 0 right). Row i leads from frame i to frame i + 1.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs import build, storage, to_dict
from configs.errors import UserError
from configs.game import ActionSpace, GameConfig
from data_pipeline.readers.keys import mouse_rows
from data_pipeline.readers.logs import check_frame_numbers, read_facts, read_frame_rows, read_rows
from data_pipeline.readers.recording import VIDEOS, Format, cut_episodes, find_folders, list_files, open_video
from data_pipeline.types import Actions, Episode, Footage
from data_pipeline.video import write_video

VIDEO, ACTIONS, ABOUT = "video.mp4", "actions.csv", "episode.json"
# What each file of an episode may be called, as `list_files` has it.
FILES = {VIDEO: [f"/video{suffix}" for suffix in VIDEOS], ACTIONS: [f"/{ACTIONS}"], ABOUT: [f"/{ABOUT}"]}
MOUSE_COLUMNS = ("pitch_deg", "yaw_deg")


@dataclass(frozen=True)
class About:
    """What every `episode.json` must say; more may stand beside it."""

    fps: float
    frames: int
    height: int  # px
    width: int  # px
    action_space: ActionSpace


def find_episodes(source: str | Path) -> dict[str, Path]:
    """The episode folders directly in `source`, by name: those with any of the files, even if others are missing."""
    return find_folders(source, ", ".join(FILES), _list)


def _list(folder: Path) -> list[Path]:
    return list_files(folder, *(name for names in FILES.values() for name in names))


def _only(folder: Path, files: Sequence[Path], name: str) -> Path:
    paths = [path for path in files if f"/{path.name.lower()}" in FILES[name]]
    if len(paths) > 1:
        raise UserError(f"{folder} holds {' and '.join(path.name for path in paths)}; leave the one that is its {name}")
    return paths[0] if paths else folder / name


def read_episode(folder: str | Path, game: GameConfig) -> Episode:
    """The episode in `folder`, its actions in the units of the game's action space."""
    folder = storage.path(folder)
    files = _list(folder)
    video, table, path = (_only(folder, files, name) for name in FILES)
    about, footage = read_facts(About, path), open_video(video, game)
    if about.action_space.hash != game.action_space.hash:
        spaces = f"{about.action_space.describe()}, the game {game.name!r} has {game.action_space.describe()}"
        raise UserError(f"{path} has the action space {spaces}")
    facts = {"fps": game.fps, "frames": footage.frames, "height": footage.height, "width": footage.width}
    # Of pictures that are turned or stretched, some recorders write the stored size and some the one that is shown.
    for name in ("fps", "frames") if footage.changes else facts:
        if getattr(about, name) != facts[name]:
            source = f"the game {game.name!r}" if name == "fps" else video
            raise UserError(f"{path} says {name} {getattr(about, name)}, {source} has {facts[name]}")
    (episode,) = cut_episodes(folder.name, footage, read_actions(table, game.action_space, footage))
    return episode


FORMAT = Format(find_episodes, lambda name, folder, game: [read_episode(folder, game)])


def read_actions(path: str | Path, space: ActionSpace, footage: Footage | None = None) -> Actions:
    """The rows of an `actions.csv`, one per frame of `footage` if it is given: keyboard (n k), mouse (n 2)."""
    path = storage.path(path)
    rows = read_frame_rows(path, footage) if footage else list(read_rows(path))
    columns = ["frame", *space.keys, *(MOUSE_COLUMNS if space.mouse else ())]
    there = list(rows[0].cells) if rows else []
    if {*there} != {*columns}:
        raise UserError(f"{path}: columns must be {','.join(columns)}, not {','.join(map(repr, there)):.300}")
    check_frame_numbers(rows, "frame", first=0)
    keyboard = np.array([[row.down(key) for key in space.keys] for row in rows], dtype=np.float32)
    degrees = np.array([[row.number(name) for name in MOUSE_COLUMNS if space.mouse] for row in rows])
    return Actions(keyboard, mouse_rows(space, degrees, lambda i: rows[i].where))


def describe_episode(game: GameConfig, frames: int) -> dict[str, Any]:
    """What every `episode.json` must hold; a seed, a licence and what else is known may stand beside it."""
    facts = to_dict(game)
    size = {name: facts[name] for name in ("fps", "height", "width")}
    return {"game": game.name, **size, "frames": frames, "action_space": facts["action_space"]}


def write_episode(
    folder: str | Path,
    about: Mapping[str, Any],  # describe_episode, and more
    frames: Iterable[np.ndarray],
    keyboard: np.ndarray,
    mouse_deg: np.ndarray,
    crf: int = 14,  # H.264 quality; small noisy pictures need a low one
) -> None:
    """Writes an episode folder, whole or not at all: frames (h w 3) uint8, keyboard (n k), mouse (n 2) degrees. On a
    server the folder is whole when it has its episode.json."""
    with storage.writing_folder(folder, last=ABOUT, new=True) as part:
        write_video(part / VIDEO, frames, about["fps"], crf)
        write_actions(part / ACTIONS, build(ActionSpace, about["action_space"]), keyboard, mouse_deg)
        storage.write_text(part / ABOUT, json.dumps(about, indent=1) + "\n")


def write_actions(path: str | Path, space: ActionSpace, keyboard: np.ndarray, mouse_deg: np.ndarray) -> None:
    """Writes keyboard (n k) of 0 and 1 and mouse (n 2) in degrees, if there is one, as `actions.csv`."""
    columns = [*space.keys, *(MOUSE_COLUMNS if space.mouse else ())]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["frame", *columns])
        for i, (keys, degrees) in enumerate(zip(keyboard, mouse_deg, strict=True)):
            moved = (f"{value:.4f}" for value in degrees) if space.mouse else ()
            writer.writerow([i, *(int(key) for key in keys), *moved])
