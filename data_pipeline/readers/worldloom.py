"""Worldloom's own recordings: a folder per episode with `video.mp4`, `actions.csv` and `episode.json`.

`actions.csv` has one row per frame: `frame`, one column of 0 or 1 per key by its name, and `pitch_deg,yaw_deg`, how far
the view turns during the frame's interval (pitch > 0 up, yaw > 0 right). Row i leads from frame i to frame i + 1.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs import build, to_dict
from configs.files import write_text
from data_pipeline.types import Actions, ActionSpace, GameConfig
from data_pipeline.video import probe, read_frames, write_video

VIDEO, ACTIONS, ABOUT = "video.mp4", "actions.csv", "episode.json"
MOUSE_COLUMNS = ("pitch_deg", "yaw_deg")


@dataclass(frozen=True)
class RecordedEpisode:
    """One episode folder; frames are decoded when asked for."""

    id: str  # the folder's name
    video: Path
    fps: float
    height: int  # px, as recorded
    width: int  # px
    action_space: ActionSpace
    actions: Actions

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, (h w 3) uint8 RGB, as recorded."""
        count = 0
        for count, frame in enumerate(read_frames(self.video), start=1):
            if count > len(self.actions):
                break
            yield frame
        if count != len(self.actions):
            raise ValueError(
                f"{self.video} decodes to another number of frames than the {len(self.actions)} rows of "
                f"{self.video.with_name(ACTIONS)}; write one row per frame"
            )


def find_episodes(source: str | Path) -> list[Path]:
    """The episode folders directly in `source`, by name. Names that begin with a dot are unfinished ones."""
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"no folder of recordings {source}")
    found = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{source} holds no episode folders ({VIDEO}, {ACTIONS}, {ABOUT} each); record some first")
    return found


def read_about(folder: Path, game: GameConfig) -> dict[str, Any]:
    """`episode.json`, checked against the game's fps and action space."""
    path = folder / ABOUT
    about = _read_json(path)
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


def read_episode(folder: str | Path, game: GameConfig) -> RecordedEpisode:
    """The episode in `folder`, its actions in the units of the game's action space.

    Raises ValueError in one line: rows and frames disagree, another fps or action space than the game's, a truncated
    video, missing or unknown columns, a cell that is no number.
    """
    folder = Path(folder)
    read_about(folder, game)
    video, table = folder / VIDEO, folder / ACTIONS
    actions = read_actions(table, game.action_space)
    info = probe(video)
    if info.frames != len(actions):
        raise ValueError(f"{table} has {len(actions)} rows, {video} has {info.frames} frames; write one row per frame")
    if abs(info.fps - game.fps) > 0.01:
        raise ValueError(
            f"{video} runs at {info.fps:g} fps, the game {game.name!r} at {game.fps:g}; resample the recording"
        )
    return RecordedEpisode(folder.name, video, game.fps, info.height, info.width, game.action_space, actions)


def read_actions(path: str | Path, space: ActionSpace) -> Actions:
    """The rows of an `actions.csv`: keyboard (n k) of 0 and 1, mouse (n 2) in units of `space.mouse_unit_deg`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no action file {path}")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    columns = list(space.keys) + (list(MOUSE_COLUMNS) if space.mouse else [])
    header = [name.strip() for name in rows[0]] if rows else []
    missing = [name for name in ("frame", *columns) if name not in header]
    unknown = [name for name in header if name not in ("frame", *columns)]
    if missing or unknown or len(set(header)) != len(header):
        raise ValueError(
            f"{path}: columns must be frame,{','.join(columns)}; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    table = np.array(
        [_read_row(path, line, header, row) for line, row in enumerate(rows[1:], start=2)], dtype=np.float64
    )
    table = table.reshape(len(rows) - 1, len(header))
    _check_table(path, table, header, space)
    keyboard = table[:, [header.index(key) for key in space.keys]]
    mouse = table[:, [header.index(name) for name in MOUSE_COLUMNS if space.mouse]] / space.mouse_unit_deg
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
    """Writes an episode folder, whole or not at all: frames (h w 3) uint8, keyboard (n k), mouse (n 2) degrees."""
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)
    try:
        write_video(part / VIDEO, frames, about["fps"], crf)
        write_actions(part / ACTIONS, build(ActionSpace, about["action_space"]), keyboard, mouse_deg)
        write_text(part / ABOUT, json.dumps(about, indent=1) + "\n")
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_actions(path: str | Path, space: ActionSpace, keyboard: np.ndarray, mouse_deg: np.ndarray) -> None:
    """Writes keyboard (n k) of 0 and 1 and mouse (n 2) in degrees as `actions.csv`."""
    columns = [*space.keys, *(MOUSE_COLUMNS if space.mouse else ())]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["frame", *columns])
        for i, (keys, degrees) in enumerate(zip(keyboard, mouse_deg, strict=True)):
            writer.writerow([i, *(int(key) for key in keys), *(f"{value:.4f}" for value in degrees)])


def _read_row(path: Path, line: int, header: list[str], row: list[str]) -> list[float]:
    if len(row) != len(header):
        raise ValueError(f"{path} line {line}: {len(row)} cells, the header has {len(header)}")
    for name, cell in zip(header, row, strict=True):
        if not _is_number(cell):
            raise ValueError(f"{path} line {line}: {name} is {cell!r}, which is no number")
    return [float(cell) for cell in row]


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _check_table(path: Path, table: np.ndarray, header: list[str], space: ActionSpace) -> None:
    wrong = np.flatnonzero(table[:, header.index("frame")] != np.arange(len(table)))
    if len(wrong):
        raise ValueError(f"{path} line {wrong[0] + 2}: frame must count 0, 1, 2, ... without gaps")
    for key in space.keys:
        wrong = np.flatnonzero(~np.isin(table[:, header.index(key)], (0, 1)))
        if len(wrong):
            raise ValueError(f"{path} line {wrong[0] + 2}: {key} must be 0 or 1")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; every episode folder needs {VIDEO}, {ACTIONS} and {ABOUT}")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold an object")
    return loaded
