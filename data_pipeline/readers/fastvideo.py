"""FastVideo's folders for Matrix-Game 2: `merge.txt`, a json that lists videos, and a .npy of actions for each.

A line of `merge.txt` is `folder,annotations.json`. The json is a list of objects with `path`, a video, and
`action_path`, both in that folder (preprocessing_datasets.py of FastVideo 0.2.1). The .npy holds a pickled dict with
`keyboard` (n k) and `mouse` (n 2), or the keyboard alone as an array (matrixgame2_preprocess_pipeline.py); read by
an unpickler that admits numpy arrays and nothing else. Names lead to files in `source`; FastVideo resolves those in
`merge.txt` where it is started, so if the beginning of one is not there, the rest of it is looked for.

Row i is held on frame i, so it is action i and leads to frame i + 1. FastVideo takes the first 77 rows and frames, so
either may go on for longer than the other; what has no counterpart is left out. Column j of the keyboard is key j of
the game's action space (`game.inputs.keys` can bind keys to columns by number instead). The mouse is (pitch, yaw) in
units of the action space, or of `game.inputs.pitch_deg` and `yaw_deg` degrees; up and right are positive.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.foreign import inside, parse_json
from configs.game import GameConfig
from data_pipeline.readers.keys import bind_keys, mouse_rows
from data_pipeline.readers.npy import read_npy
from data_pipeline.readers.recording import Recording, VideoEpisode, check_rows, cut_video, probe_video, read_text, say
from data_pipeline.types import Actions

MERGE, ROWS = "merge.txt", 77


def find_recordings(source: str | Path) -> list[Recording]:
    """The videos that `merge.txt` leads to, by their paths."""
    merge, found = storage.path(source) / MERGE, {}
    for number, line in enumerate(read_text(merge).splitlines(), start=1):
        names, where = [name.strip() for name in line.split(",")], f"{merge} line {number}"
        if names == [""]:
            continue
        if len(names) != 2:
            raise UserError(f"{where} must be folder,annotations.json, not {line[:80]!r}")
        folder, annotations = (_find(merge.parent, name, where) for name in names)
        for name, recording in _read_annotations(folder, annotations).items():
            if found.setdefault(name, recording) is not recording:
                raise UserError(f"{where}: {annotations} names a second video {name}; rename one")
    if not found:
        raise UserError(f"{merge} leads to no videos")
    return [found[name] for name in sorted(found)]


def _read_annotations(folder: Path, annotations: Path) -> dict[str, Recording]:
    """The recordings that a json lists, by name."""
    items, found = parse_json(read_text(annotations), annotations), {}
    if not isinstance(items, list):
        raise UserError(f"{annotations} must hold a list of objects with path and action_path")
    for i, item in enumerate(items):
        path = item.get("path") if isinstance(item, dict) else None
        if not isinstance(path, str):
            raise UserError(f"{annotations} item {i}: path is {path!r:.80}, which is no file's name")
        name = PurePosixPath("-".join(part for part in PurePosixPath(path).parts if part != "/")).stem
        if name in found:
            raise UserError(f"{annotations} item {i}: {path[:80]!r} is listed twice")
        found[name] = Recording(name, partial(read_item, name, folder, item, f"{annotations} item {i}"))
    return found


def _find(folder: Path, name: str, where: str) -> Path:
    """The file or folder `name` in `folder`: all of the path, or what remains of it without its first parts.

    Raises ValueError if it is not there, or not in `folder`.
    """
    parts = name.lstrip("/").split("/")
    for i in range(len(parts)):
        path = inside(folder, "/".join(parts[i:]), where)
        if path.is_file() or path.is_dir():
            return path
    raise UserError(f"{where} names {name[:200]!r}, which is not in {folder}")


def read_item(name: str, folder: Path, item: Mapping[str, Any], where: str, game: GameConfig) -> list[VideoEpisode]:
    """The one episode of a video; `item` of the json `where` names its files.

    Raises ValueError in one line: a file outside of `folder`, another fps, rows that are no actions of the game.
    """
    if not isinstance(item.get("action_path"), str):
        raise UserError(f"{where}: action_path is {item.get('action_path')!r:.80}; a video needs its actions")
    # An absolute path was one on the machine where the json was written.
    video, log = (
        _find(folder, path, where) if path.startswith("/") else inside(folder, path, where)
        for path in (item["path"], item["action_path"])
    )
    info, actions = probe_video(video, game), read_actions(log, game)
    if len(actions) != info.frames:
        if min(len(actions), info.frames) < ROWS:
            check_rows(log, len(actions), video, info)
        say(f"{folder}: where rows and frames are not as many, those without a counterpart are left out")
    actions = actions[: info.frames]
    return cut_video(name, video, info, game, actions, [(0, len(actions))])


def read_actions(log: Path, game: GameConfig) -> Actions:
    """The rows of a .npy as the game's actions. Raises ValueError in one line with the row."""
    arrays = read_npy(log)
    keyboard, mouse = (arrays.get(key, arrays.get("") if key == "keyboard" else None) for key in ("keyboard", "mouse"))
    if keyboard is None or keyboard.ndim != 2:
        raise UserError(f"{log} holds no keyboard (rows, keys), but {_describe(arrays)}")
    if game.action_space.mouse and (mouse is None or mouse.shape != (len(keyboard), 2)):
        raise UserError(
            f"{log} holds no mouse ({len(keyboard)}, 2), but {_describe(arrays)}; or set action_space.mouse=false"
        )
    wrong = np.argwhere((keyboard != 0) & (keyboard != 1))
    if len(wrong):
        row, column = (int(number) for number in wrong[0])
        raise UserError(f"{log} row {row}: keyboard column {column} is {keyboard[row, column]:g}; a key is 0 or 1")
    held = _bind_columns(log, keyboard.astype(np.float32), game)
    unit = game.action_space.mouse_unit_deg
    scale = game.inputs.pitch_deg or unit, game.inputs.yaw_deg or unit
    degrees = mouse.astype(np.float64) * scale if mouse is not None else np.zeros((len(held), 2))
    return Actions(held, mouse_rows(game, degrees, lambda i: f"{log} row {i}"))


def _bind_columns(log: Path, keyboard: np.ndarray, game: GameConfig) -> np.ndarray:
    """The keyboard vectors (n k) of columns (n c)."""
    count = keyboard.shape[1]
    if not game.inputs.keys:
        if count != len(game.action_space.keys):
            raise UserError(
                f"{log}: keyboard has {count} columns, {game.name!r} has the keys {', '.join(game.action_space.keys)}; "
                "bind keys to columns by number in game.inputs.keys"
            )
        return keyboard
    keys = bind_keys(game, [str(column) for column in range(count)], f"the rows of {log}")
    held = np.zeros((len(keyboard), len(game.action_space.keys)), dtype=np.float32)
    for column in range(count):
        if keyboard[:, column].any():
            keys.row([str(column)], f"{log} keyboard column")  # refused if it holds no key
        places = keys.places.get(str(column), [])
        held[:, places] = np.maximum(held[:, places], keyboard[:, [column]])
    return held


def _describe(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name or 'an array'} {array.shape}" for name, array in arrays.items())[:200] or "no arrays"
