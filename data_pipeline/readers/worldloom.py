"""Worldloom's own recordings: a folder per episode with `video.mp4`, `actions.csv` and `episode.json`.

`actions.csv` has one row per frame: `frame`, one column of 0 or 1 per key by its name, and `pitch_deg,yaw_deg`, how far
the view turns during the frame's interval (pitch > 0 up, yaw > 0 right). Row i leads from frame i to frame i + 1.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs import build, to_dict
from configs.files import atomic_folder, write_text
from data_pipeline import storage
from data_pipeline.readers.keys import check_degrees
from data_pipeline.readers.recording import (
    Recording,
    VideoEpisode,
    check_rows,
    list_folders,
    probe_video,
    read_csv,
    read_json,
    read_number,
)
from data_pipeline.types import Actions, ActionSpace, GameConfig
from data_pipeline.video import write_video

VIDEO, ACTIONS, ABOUT = "video.mp4", "actions.csv", "episode.json"
MOUSE_COLUMNS = ("pitch_deg", "yaw_deg")


def find_recordings(source: str | Path) -> list[Recording]:
    """The recordings directly in `source`, by name; each is one episode."""
    return [Recording(folder.name, partial(_read_one, folder)) for folder in find_episodes(source)]


def _read_one(folder: Path, game: GameConfig) -> list[VideoEpisode]:
    return [read_episode(folder, game)]


def find_episodes(source: str | Path) -> list[Path]:
    """The episode folders directly in `source`, by name."""
    found = list_folders(source)
    if not found:
        raise ValueError(f"{source} holds no episode folders ({VIDEO}, {ACTIONS}, {ABOUT} each); record some first")
    return found


def read_about(folder: Path, game: GameConfig) -> dict[str, Any]:
    """`episode.json`, checked against the game's fps and action space."""
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; every episode folder needs {VIDEO}, {ACTIONS} and {ABOUT}")
    about = read_json(path)
    missing = [key for key in ("fps", "frames", "height", "width", "action_space") if key not in about]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if about["fps"] != game.fps:
        raise ValueError(
            f"{path} says {about['fps']} fps, the game {game.name!r} has {game.fps}; set game.fps or resample"
        )
    space = build(ActionSpace, about["action_space"], f"{path}: action_space.")
    if space.hash != game.action_space.hash:
        raise ValueError(
            f"{path} has the action space {space.describe()}, the game {game.name!r} has "
            f"{game.action_space.describe()}; use the config of the game that was recorded"
        )
    return about


def read_episode(folder: str | Path, game: GameConfig) -> VideoEpisode:
    """The episode in `folder`, its actions in the units of the game's action space.

    Raises ValueError in one line: rows and frames disagree, another fps or action space than the game's, a truncated
    video, missing or unknown columns, a cell that is no number.
    """
    folder = storage.path(folder)
    read_about(folder, game)
    video, table = folder / VIDEO, folder / ACTIONS
    actions = read_actions(table, game.action_space)
    info = probe_video(video, game)
    check_rows(table, len(actions), video, info)
    return VideoEpisode(folder.name, video, 0, game.fps, info.height, info.width, game.action_space, actions)


def read_actions(path: str | Path, space: ActionSpace) -> Actions:
    """The rows of an `actions.csv`: keyboard (n k) of 0 and 1, mouse (n 2) in units of `space.mouse_unit_deg`."""
    path = storage.path(path)
    header, rows = read_csv(path)
    columns = list(space.keys) + (list(MOUSE_COLUMNS) if space.mouse else [])
    missing = [name for name in ("frame", *columns) if name not in header]
    unknown = [name for name in header if name not in ("frame", *columns)]
    if missing or unknown or len(set(header)) != len(header):
        raise ValueError(
            f"{path}: columns must be frame,{','.join(columns)}; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    numbers = [
        [read_number(cell, f"{path} line {line}: {name}") for name, cell in zip(header, row, strict=True)]
        for line, row in rows
    ]
    table = np.array(numbers, dtype=np.float64).reshape(len(rows), len(header))
    _check_table(path, [line for line, _ in rows], table, header, space)
    keyboard = table[:, [header.index(key) for key in space.keys]]
    degrees = table[:, [header.index(name) for name in MOUSE_COLUMNS if space.mouse]]
    mouse = check_degrees(degrees, lambda i: f"{path} line {rows[i][0]}") / space.mouse_unit_deg
    return Actions(keyboard.astype(np.float32), mouse.astype(np.float32))


def describe_episode(game: GameConfig, frames: int) -> dict[str, Any]:
    """What every `episode.json` must hold; a seed, a licence and what else is known may stand beside it."""
    facts = to_dict(game)
    return {
        "game": facts["name"],
        **{name: facts[name] for name in ("fps", "height", "width")},
        "frames": frames,
        "action_space": facts["action_space"],
    }


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
    s3 = storage.is_s3(folder)
    with storage.writing_folder(folder, last=ABOUT) if s3 else atomic_folder(folder) as part:
        write_video(part / VIDEO, frames, about["fps"], crf)
        write_actions(part / ACTIONS, build(ActionSpace, about["action_space"]), keyboard, mouse_deg)
        write_text(part / ABOUT, json.dumps(about, indent=1) + "\n")


def write_actions(path: str | Path, space: ActionSpace, keyboard: np.ndarray, mouse_deg: np.ndarray) -> None:
    """Writes keyboard (n k) of 0 and 1 and mouse (n 2) in degrees, if there is one, as `actions.csv`."""
    columns = [*space.keys, *(MOUSE_COLUMNS if space.mouse else ())]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["frame", *columns])
        for i, (keys, degrees) in enumerate(zip(keyboard, mouse_deg, strict=True)):
            moved = (f"{value:.4f}" for value in degrees) if space.mouse else ()
            writer.writerow([i, *(int(key) for key in keys), *moved])


def _check_table(path: Path, lines: Sequence[int], table: np.ndarray, header: list[str], space: ActionSpace) -> None:
    wrong = np.flatnonzero(table[:, header.index("frame")] != np.arange(len(table)))
    if len(wrong):
        raise ValueError(f"{path} line {lines[wrong[0]]}: frame must count 0, 1, 2, ... without gaps")
    for key in space.keys:
        wrong = np.flatnonzero(~np.isin(table[:, header.index(key)], (0, 1)))
        if len(wrong):
            raise ValueError(f"{path} line {lines[wrong[0]]}: {key} must be 0 or 1")
