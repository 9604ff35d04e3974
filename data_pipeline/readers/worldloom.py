"""Worldloom's own recordings: a folder per episode with `video.mp4`, `actions.csv` and `episode.json`.

The video may be in any container that FFmpeg reads (`video.mkv`, `Video.MOV`).

`actions.csv` has one row per frame: `frame`, one column of 0 or 1 per key by its name, and `pitch_deg,yaw_deg`, how far
the view turns during the frame's interval (pitch > 0 up, yaw > 0 right). Row i leads from frame i to frame i + 1.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs import build, build_from, storage, to_dict
from configs.errors import MissingFileError, UserError
from configs.files import atomic_folder, write_text
from configs.game import ActionSpace, GameConfig
from data_pipeline.readers.keys import check_degrees
from data_pipeline.readers.recording import (
    LARGEST,
    VIDEOS,
    Recording,
    VideoEpisode,
    check_rows,
    find_folders,
    list_files,
    list_names,
    probe_video,
    read_csv,
    read_json,
    read_number,
)
from data_pipeline.types import Actions
from data_pipeline.video import VideoInfo, write_video

VIDEO, ACTIONS, ABOUT = "video.mp4", "actions.csv", "episode.json"
MOUSE_COLUMNS = ("pitch_deg", "yaw_deg")


@dataclass(frozen=True)
class About:
    """What every `episode.json` must say; more may stand beside it."""

    fps: float
    frames: int
    height: int  # px
    width: int  # px
    action_space: ActionSpace


def find_recordings(source: str | Path) -> list[Recording]:
    """The recordings directly in `source`, by name; each is one episode."""
    return [Recording(folder.name, partial(_read_one, folder)) for folder in find_episodes(source)]


def _read_one(folder: Path, game: GameConfig) -> list[VideoEpisode]:
    return [read_episode(folder, game)]


def find_episodes(source: str | Path) -> list[Path]:
    """The episode folders directly in `source`, by name; one in which a file is missing is found, and cannot be read.
    Folders with none of the files are left out."""
    found = find_folders(source, lambda folder: any(_find_files(folder).values()))
    if not found:
        raise UserError(f"{source} holds no episode folders ({VIDEO}, {ACTIONS}, {ABOUT} each); record some first")
    return found


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """Those in `folder` that can be its video, its actions and its description, whatever the case of their letters."""
    files = list_files(folder, *VIDEOS, ".csv", ".json")
    stem = Path(VIDEO).stem
    found = {VIDEO: [path for path in files if path.stem.lower() == stem and path.suffix.lower() in VIDEOS]}
    return found | {name: [path for path in files if path.name.lower() == name] for name in (ACTIONS, ABOUT)}


def _only(folder: Path, name: str, found: Sequence[Path]) -> Path:
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} holds {names}; leave the one that is its {name}")
    return found[0] if found else folder / name


def read_about(path: Path, game: GameConfig) -> About:
    """`episode.json`, checked against the game's fps and action space."""
    if not path.is_file():
        raise MissingFileError(f"no {path}; every episode folder needs {VIDEO}, {ACTIONS} and {ABOUT}")
    loaded, names = read_json(path), [field.name for field in fields(About)]
    missing = [name for name in names if name not in loaded]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    about = build_from(About, {name: loaded[name] for name in names}, path)
    if about.fps != game.fps:
        raise UserError(f"{path} says {about.fps} fps, the game {game.name!r} has {game.fps}; set game.fps or resample")
    space = about.action_space
    if space.hash != game.action_space.hash:
        raise UserError(
            f"{path} has the action space {space.describe()}, the game {game.name!r} has "
            f"{game.action_space.describe()}; use the config of the game that was recorded"
        )
    return about


def read_episode(folder: str | Path, game: GameConfig) -> VideoEpisode:
    """The episode in `folder`, its actions in the units of the game's action space.

    Raises ValueError in one line: rows and frames disagree, another fps, size or action space than the game's or the
    video's, a truncated video, missing or unknown columns, a cell that is no number.
    """
    folder = storage.path(folder)
    video, table, about = (_only(folder, name, found) for name, found in _find_files(folder).items())
    said, info = read_about(about, game), probe_video(video, game)
    _compare(about, said, video, info)
    actions = read_actions(table, game.action_space, info.frames)
    check_rows(table, len(actions), video, info)
    return VideoEpisode(folder.name, video, 0, game.fps, info.height, info.width, game.action_space, actions)


def _compare(path: Path, about: About, video: Path, info: VideoInfo) -> None:
    """Raises ValueError if `episode.json` tells of another video than the one beside it."""
    # Of pictures that are turned or stretched, some recorders write the stored size and some the one that is shown.
    for name in ("frames",) if info.changes else ("frames", "height", "width"):
        told, found = getattr(about, name), getattr(info, name)
        if told != found:
            raise UserError(f"{path} says {name} {told}, {video} has {found}; it is of another video, or wrong")


def read_actions(path: str | Path, space: ActionSpace, frames: int | None = None) -> Actions:
    """The rows of an `actions.csv`: keyboard (n k) of 0 and 1, mouse (n 2) in units of `space.mouse_unit_deg`.

    With `frames`, those of its video, more rows are an error before they are parsed.
    """
    path = storage.path(path)
    header, rows = read_csv(path, frames)
    columns = list(space.keys) + (list(MOUSE_COLUMNS) if space.mouse else [])
    missing = [name for name in ("frame", *columns) if name not in header]
    unknown = [name for name in header if name not in ("frame", *columns)]
    if missing or unknown or len(set(header)) != len(header):
        raise UserError(
            f"{path}: columns must be frame,{','.join(columns)}; missing: {list_names(missing) or 'none'}; "
            f"unknown: {list_names(unknown) or 'none'}"
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
    if not (np.abs(mouse) <= LARGEST).all():
        raise UserError(f"{path}: degrees of mouse_unit_deg={space.mouse_unit_deg:g} are too large; use a larger unit")
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
        raise UserError(f"{path} line {lines[wrong[0]]}: frame must count 0, 1, 2, ... without gaps")
    for key in space.keys:
        wrong = np.flatnonzero(~np.isin(table[:, header.index(key)], (0, 1)))
        if len(wrong):
            raise UserError(f"{path} line {lines[wrong[0]]}: {key} must be 0 or 1")
