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

import io
import pickle
import tokenize
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.game import GameConfig
from configs.untrusted import inside, parse_json, reading
from data_pipeline.readers.keys import bind_keys, mouse_rows
from data_pipeline.readers.logs import check_row_count, read_text
from data_pipeline.readers.recording import Format, cut_episodes, open_video, say
from data_pipeline.types import Actions, Episode

MERGE, ROWS = "merge.txt", 77


class Item(NamedTuple):
    """A video in a json."""

    folder: Path
    files: Mapping[str, Any]  # `path` and `action_path` in the folder
    where: str  # json and item, in errors


def find_recordings(source: str | Path) -> dict[str, Item]:
    """The videos that `merge.txt` leads to, by their paths."""
    merge = storage.path(source) / MERGE
    items: dict[str, Item] = {}
    for number, line in enumerate(read_text(merge).splitlines(), start=1):
        names, where = [name.strip() for name in line.split(",")], f"{merge} line {number}"
        if names == [""]:
            continue
        if len(names) != 2:
            raise UserError(f"{where} must be folder,annotations.json, not {line[:80]!r}")
        folder, annotations = (_find(merge.parent, name, where) for name in names)
        listed = parse_json(read_text(annotations), annotations)
        if not isinstance(listed, list) or not all(isinstance(files, dict) for files in listed):
            raise UserError(f"{annotations} must hold a list of objects with path and action_path")
        for i, files in enumerate(listed):
            item = Item(folder, files, f"{annotations} item {i}")
            name = PurePosixPath(_path(item, "path").strip("/").replace("/", "-")).stem
            if name in items:
                raise UserError(f"{where}: {item.where} names a second video {name}; rename one")
            items[name] = item
    return items


def _path(item: Item, name: str) -> str:
    path = item.files.get(name)
    if not isinstance(path, str):
        raise UserError(f"{item.where}: {name} is {path!r:.80}, which is no file's name")
    return path


def _find(folder: Path, name: str, where: str) -> Path:
    """The file or folder `name` in `folder`: all of the path, or what remains of it without its first parts."""
    parts = name.lstrip("/").split("/")
    for i in range(len(parts)):
        path = inside(folder, "/".join(parts[i:]), where)
        if path.is_file() or path.is_dir():
            return path
    raise UserError(f"{where} names {name[:200]!r}, which is not in {folder}")


def read_item(name: str, item: Item, game: GameConfig) -> list[Episode]:
    """The one episode of a video."""
    paths = [_path(item, name) for name in ("path", "action_path")]
    # An absolute path was one on the machine where the json was written.
    video, log = ((_find if path.startswith("/") else inside)(item.folder, path, item.where) for path in paths)
    footage, actions = open_video(video, game), read_actions(log, game)
    if len(actions) != footage.frames:
        if min(len(actions), footage.frames) < ROWS:
            check_row_count(log, len(actions), footage)
        say(f"{item.folder}: where rows and frames are not as many, those without a counterpart are left out")
    return cut_episodes(name, footage, actions[: footage.frames])


FORMAT = Format(find_recordings, read_item)


def read_actions(log: Path, game: GameConfig) -> Actions:
    """The rows of a .npy as the game's actions."""
    arrays, space = read_npy(log), game.action_space
    keyboard, mouse = arrays.get("keyboard"), arrays.get("mouse")
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no arrays"
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


def read_npy(path: Path) -> dict[str, np.ndarray]:
    """`keyboard` and `mouse` of the dict in a .npy file; or the array that is all of the file, which is a keyboard.

    A UserError for a file that holds anything but numbers, and for a pickle that makes anything but arrays.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    with reading(path):
        file = io.BytesIO(path.read_bytes())
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise UserError(f"its version is {version}")
        try:
            dtype = np.lib.format.read_array_header_1_0(file)[2]
        except (SyntaxError, tokenize.TokenError) as error:
            raise UserError(f"its header is damaged: {error}") from error
        if not dtype.hasobject:
            file.seek(0)
            return {"keyboard": _require_numbers(np.lib.format.read_array(file, allow_pickle=False))}
        _, _, _, _, [named] = _Unpickler(file, path).load().state
        return {name: _build_array(*named[name].state) for name in ("keyboard", "mouse") if name in named}


def _build_array(_: Any, shape: tuple[int, ...], dtype: "_Part", fortran: bool, data: bytes) -> np.ndarray:
    """The array of numbers whose pickled state this is."""
    numbers = np.frombuffer(data, dtype.state[1] + dtype.args[0])
    return _require_numbers(numbers).reshape(shape, order="F" if fortran else "C")


def _require_numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise UserError(f"it holds {array.dtype!s:.80}, no numbers")
    return array


class _Part:
    """Stands for an array or the type of its numbers; a hostile pickle could give numpy's own ones any memory to read.

    A pickle cannot change it: what it would set becomes its state.
    """

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, tuple[Any, ...]()

    def __setstate__(self, state: Any) -> None:
        self.state = state


ADMITTED = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")} | {"numpy.ndarray", "numpy.dtype"}


class _Unpickler(pickle._Unpickler):
    """Admits numpy arrays alone. It is Python's, since the one in C takes as much memory as a file asks for."""

    # The one instruction that takes memory before its bytes are there; arrays in .npy files do without.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> type:
        wanted = f"{module}.{name}"
        if wanted not in ADMITTED:
            raise UserError(f"{self.path} wants to run {wanted[:80]!r}; only numpy arrays are read of it")
        return _Part
