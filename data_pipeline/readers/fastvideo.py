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
from data_pipeline.readers.logs import check_row_count, read_text
from data_pipeline.readers.npy import read_npy
from data_pipeline.readers.recording import Format, Recording, cut_episodes, open_video, say
from data_pipeline.types import Actions, Episode

MERGE, ROWS = "merge.txt", 77


def find_recordings(source: str | Path) -> list[Recording]:
    """The videos that `merge.txt` leads to, by their paths."""
    merge = storage.path(source) / MERGE
    found: dict[str, Recording] = {}
    for number, line in enumerate(read_text(merge).splitlines(), start=1):
        names, where = [name.strip() for name in line.split(",")], f"{merge} line {number}"
        if names == [""]:
            continue
        if len(names) != 2:
            raise UserError(f"{where} must be folder,annotations.json, not {line[:80]!r}")
        folder, annotations = (_find(merge.parent, name, where) for name in names)
        items = parse_json(read_text(annotations), annotations)
        if not isinstance(items, list):
            raise UserError(f"{annotations} must hold a list of objects with path and action_path")
        for i, item in enumerate(items):
            recording = _find_recording(folder, item, f"{annotations} item {i}")
            if found.setdefault(recording.name, recording) is not recording:
                raise UserError(f"{where}: {annotations} item {i} names a second video {recording.name}; rename one")
    if not found:
        raise UserError(f"{merge} leads to no videos")
    return [found[name] for name in sorted(found)]


FORMAT = Format(find_recordings)


def _find_recording(folder: Path, item: Any, where: str) -> Recording:
    path = item.get("path") if isinstance(item, dict) else None
    if not isinstance(path, str):
        raise UserError(f"{where}: path is {path!r:.80}, which is no file's name")
    name = PurePosixPath("-".join(part for part in PurePosixPath(path).parts if part != "/")).stem
    return Recording(name, partial(read_item, name, folder, item, where))


def _find(folder: Path, name: str, where: str) -> Path:
    """The file or folder `name` in `folder`: all of the path, or what remains of it without its first parts."""
    parts = name.lstrip("/").split("/")
    for i in range(len(parts)):
        path = inside(folder, "/".join(parts[i:]), where)
        if path.is_file() or path.is_dir():
            return path
    raise UserError(f"{where} names {name[:200]!r}, which is not in {folder}")


def read_item(name: str, folder: Path, item: Mapping[str, Any], where: str, game: GameConfig) -> list[Episode]:
    """The one episode of a video; `item` of the json `where` names its files."""
    if not isinstance(item.get("action_path"), str):
        raise UserError(f"{where}: action_path is {item.get('action_path')!r:.80}; a video needs its actions")
    # An absolute path was one on the machine where the json was written.
    video, log = (
        _find(folder, path, where) if path.startswith("/") else inside(folder, path, where)
        for path in (item["path"], item["action_path"])
    )
    footage, actions = open_video(video, game), read_actions(log, game)
    if len(actions) != footage.frames:
        if min(len(actions), footage.frames) < ROWS:
            check_row_count(log, len(actions), footage)
        say(f"{folder}: where rows and frames are not as many, those without a counterpart are left out")
    return cut_episodes(name, footage, actions[: footage.frames])


def read_actions(log: Path, game: GameConfig) -> Actions:
    """The rows of a .npy as the game's actions."""
    arrays, space = read_npy(log), game.action_space
    keyboard, mouse = arrays.get("keyboard", arrays.get("")), arrays.get("mouse")
    shapes = ", ".join(f"{name or 'an array'} {array.shape}" for name, array in arrays.items())[:200] or "no arrays"
    if keyboard is None or keyboard.ndim != 2:
        raise UserError(f"{log} holds no keyboard (rows, keys), but {shapes}")
    if space.mouse and (mouse is None or mouse.shape != (len(keyboard), 2)):
        raise UserError(f"{log} holds no mouse ({len(keyboard)}, 2), but {shapes}; or set action_space.mouse=false")
    names = [str(column) for column in range(keyboard.shape[1])] if game.inputs.keys else list(space.keys)
    if len(names) != keyboard.shape[1]:
        raise UserError(f"{log}: {keyboard.shape[1]} columns, {len(names)} keys; bind them in game.inputs.keys")
    held = bind_keys(game, names).rows(names, keyboard, lambda i: f"{log} row {i}: keyboard column")
    scale = game.inputs.pitch_deg or space.mouse_unit_deg, game.inputs.yaw_deg or space.mouse_unit_deg
    degrees = mouse.astype(np.float64) * scale if space.mouse and mouse is not None else np.zeros((len(held), 2))
    return Actions(held, mouse_rows(space, degrees, lambda i: f"{log} row {i}"))
