"""Counter-Strike deathmatch of Pearce and Zhu, as DIAMOND uses it: HDF5 files of 1,000 frames, 16 Hz.

`frame_i_x` is the picture (h w 3) uint8, 150 x 280, its channels BGR (DIAMOND flips them when it reads). `frame_i_y` is
what the player does on seeing it, the target of a policy at frame i, so it is action i and leads to frame i + 1 (the
actions of the step before are kept apart, in `frame_i_xaux`). It holds, as 0 and 1: 11 keys (w, a, s, d, space, ctrl,
shift, 1, 2, 3, r), the left and the right mouse button, one of 23 bins of mouse x, one of 15 of mouse y. The bins are
pixels, not evenly spaced (MOUSE_X, MOUSE_Y: those of the authors' config), x to the right and y downwards; how many
degrees a pixel is depends on the player's sensitivity, and `game.inputs.yaw_deg` and `pitch_deg` say it.

`frame_i_helperarr` is [kill, death]. At a death the picture jumps to where the player respawns, so frame i is left
out then, an episode ends there and another begins behind. The files lie in `source` itself, or in folders as DIAMOND
keeps them (`full_res/1-200/*.hdf5`).

Only these three kinds of arrays are read, as numbers that the file itself holds: HDF5 can name data of other files
(external storage, links, virtual datasets), which are refused. Pickles that lie about in such data are never opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import h5py.h5l
import numpy as np

from configs import storage
from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers.keys import bind_keys, scale_mouse
from data_pipeline.readers.recording import Format, cut_episodes, list_files, reading_with
from data_pipeline.types import Actions, Episode, Footage

FPS = 16
NAMES = (
    *("w", "a", "s", "d", "space", "left_control", "left_shift", "1", "2", "3", "r"),
    *("mouse_left", "mouse_right"),
)
MOUSE_X = (-1000, -500, -300, -200, -100, -60, -30, -20, -10, -4, -2, 0, 2, 4, 10, 20, 30, 60, 100, 200, 300, 500, 1000)
MOUSE_Y = (-200, -100, -50, -20, -10, -4, -2, 0, 2, 4, 10, 20, 50, 100, 200)
WIDTH = len(NAMES) + len(MOUSE_X) + len(MOUSE_Y)  # 51
DEPTH = 3  # of folders in folders; full_res/1-200/ is two deep
LARGEST_BYTES = 1 << 28  # of an array: more than an 8K picture


def find_files(source: str | Path) -> dict[str, Path]:
    """The HDF5 files in `source` and in its folders, by name."""
    files: dict[str, Path] = {}
    for path in list_files(source, ".hdf5", ".h5", depth=DEPTH):
        if files.setdefault(path.stem, path) != path:
            raise UserError(f"{files[path.stem]} and {path} have the same name; choose one of their folders as source")
    return files


def read_file(name: str, path: Path, game: GameConfig) -> list[Episode]:
    """The episodes of a file, between deaths."""
    if game.fps != FPS:
        raise UserError(f"{path} has {FPS} fps, as all of its format; the game {game.name!r} has {game.fps:g}")
    keys = bind_keys(game, NAMES)
    with open_hdf5(path) as file:
        names = set(file)
        count = sum(name.startswith("frame_") and name.endswith("_x") for name in names)
        wanted = [f"frame_{i}_{part}" for i in range(max(count, 1)) for part in "xy"]
        if missing := [name for name in wanted if name not in names]:
            raise UserError(f"{path} has {count} pictures, but no {missing[0]}")
        table = np.stack([find_array(file, f"frame_{i}_y", path, (WIDTH,))[()] for i in range(count)])
        helpers = [f"frame_{i}_helperarr" for i in range(count)]
        alive = [name not in names or find_array(file, name, path, (2,))[1] == 0 for name in helpers]
        height, width, _ = read_picture(file, 0, path).shape
    held, x, y = np.split(table, [len(NAMES), len(NAMES) + len(MOUSE_X)], axis=1)
    wrong = ~np.isin(table, (0, 1)).all(axis=1) | (x.sum(axis=1) != 1) | (y.sum(axis=1) != 1)
    if wrong.any():
        raise UserError(f"{path} frame_{wrong.argmax()}_y must be 0 and 1, with one bin of mouse x and one of mouse y")
    rows = [f"{path} frame_{i}_y" for i in range(count)]
    moves = np.stack([y @ np.array(MOUSE_Y), x @ np.array(MOUSE_X)], axis=1)
    actions = Actions(keys.rows(NAMES, held, rows.__getitem__), scale_mouse(game, moves, rows.__getitem__))
    footage = Footage(path, count, height, width, partial(read_pictures, path, (height, width, 3)), is_video=False)
    return cut_episodes(name, footage, actions, np.array(alive))


FORMAT = Format(find_files, read_file)


def read_pictures(path: Path, shape: tuple[int, int, int], start: int, stop: int) -> Iterator[np.ndarray]:
    """Frames `start` to before `stop` (h w 3) uint8 RGB, all of one `shape`."""
    with open_hdf5(path) as file:
        for i in range(start, stop):
            frame = read_picture(file, i, path)
            if frame.shape != shape:
                raise UserError(f"{path} frame_{i}_x has another size than frame_0_x")
            yield frame


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The file, open for reading; what proves to be damaged in the block is a UserError."""
    source = storage.open(path) if storage.is_s3(path) else path
    with reading_with(path, "HDF5", OSError, RuntimeError), h5py.File(source, "r") as file:
        yield file


def read_picture(file: Any, i: int, path: Path) -> np.ndarray:
    """`frame_<i>_x` as (h w 3) uint8 RGB."""
    frame = find_array(file, f"frame_{i}_x", path)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or not frame.size:
        raise UserError(f"{path} frame_{i}_x is {frame.dtype} {frame.shape}, no picture (h, w, 3) of uint8")
    return np.ascontiguousarray(frame[()][:, :, ::-1])


def find_array(file: Any, name: str, path: Path, shape: tuple[int, ...] | None = None) -> Any:
    """A dataset of numbers that lie in this file, no more than a picture has, of this `shape` if it is given.

    They are not read yet.
    """
    # To open what an external link names opens another file; h5py's `in` and `get` do, too.
    if file.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise UserError(f"{path} {name} names data of another file or place; it was not read")
    array = file[name]
    if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "biuf":
        raise UserError(f"{path} {name} is {array}, no numbers")
    if array.external is not None or array.is_virtual:
        raise UserError(f"{path} {name} names data of another file; it was not read")
    if max(array.size or 0, int(np.prod(array.chunks or 0, dtype=object))) * array.dtype.itemsize > LARGEST_BYTES:
        raise UserError(f"{path} {name} has the shape {array.shape}; that is no picture and no row of a game")
    if shape is not None and array.shape != shape:
        raise UserError(f"{path} {name} has the shape {array.shape}, it must be {shape}")
    return array
