"""Counter-Strike deathmatch of Pearce and Zhu, as DIAMOND uses it: HDF5 files of 1,000 frames, 16 Hz.

`frame_i_x` is the picture (h w 3) uint8, 150 x 280, its channels BGR (DIAMOND flips them when it reads). `frame_i_y` is
what the player does on seeing it, the target of a policy at frame i, so it is action i and leads to frame i + 1 (the
actions of the step before are kept apart, in `frame_i_xaux`). It holds, as 0 and 1: 11 keys (w, a, s, d, space, ctrl,
shift, 1, 2, 3, r), the left and the right mouse button, one of 23 bins of mouse x, one of 15 of mouse y. The bins are
pixels, not evenly spaced (MOUSE_X, MOUSE_Y: those of the authors' config), x to the right and y downwards; how many
degrees a pixel is depends on the player's sensitivity, and `game.inputs.yaw_deg` and `pitch_deg` say it.

One file is one episode. Only these two kinds of arrays are read, as numbers; the pickles that lie about in such data
are never opened.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import storage
from data_pipeline.readers.keys import bind_keys, mouse_rows, require_mouse_scale
from data_pipeline.readers.recording import Recording, import_extra, list_files
from data_pipeline.types import Actions, ActionSpace, GameConfig

FPS = 16
NAMES = (
    *("w", "a", "s", "d", "space", "left_control", "left_shift", "1", "2", "3", "r"),
    *("mouse_left", "mouse_right"),
)
MOUSE_X = (-1000, -500, -300, -200, -100, -60, -30, -20, -10, -4, -2, 0, 2, 4, 10, 20, 30, 60, 100, 200, 300, 500, 1000)
MOUSE_Y = (-200, -100, -50, -20, -10, -4, -2, 0, 2, 4, 10, 20, 50, 100, 200)
WIDTH = len(NAMES) + len(MOUSE_X) + len(MOUSE_Y)  # 51


@dataclass(frozen=True)
class HDF5Episode:
    """One file; pictures are read when asked for."""

    id: str
    path: Path
    fps: float
    height: int  # px
    width: int  # px
    action_space: ActionSpace
    actions: Actions

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, (h w 3) uint8 RGB, as recorded."""
        with open_hdf5(self.path) as file:
            for i in range(len(self.actions)):
                frame = read_picture(file, i, self.path)
                if frame.shape != (self.height, self.width, 3):
                    raise ValueError(f"{self.path} frame_{i}_x has another size than frame_0_x")
                yield frame


def find_recordings(source: str | Path) -> list[Recording]:
    """The HDF5 files directly in `source`, by name."""
    files = list_files(source, ".hdf5", ".h5")
    if not files:
        raise ValueError(f"{source} holds no .hdf5 files; unpack the tars first")
    return [Recording(path.stem, partial(read_file, path)) for path in files]


def read_file(path: Path, game: GameConfig) -> list[HDF5Episode]:
    """The one episode of a file.

    Raises ValueError in one line: a truncated file, a frame left out, a row that is not as described above, a game
    with another fps or without the degrees of a pixel.
    """
    if game.fps != FPS:
        raise ValueError(
            f"{path}: CS:GO recordings have {FPS} fps, the game {game.name!r} has {game.fps:g}; set game.fps"
        )
    require_mouse_scale(game, "CS:GO recordings")
    keys = bind_keys(game, NAMES, "CS:GO recordings")
    with open_hdf5(path) as file:
        rows = [read_row(file, i, path) for i in range(count_frames(file, path))]
        height, width, _ = read_picture(file, 0, path).shape
    held = [[name for name, down in zip(NAMES, row, strict=False) if down] for row in rows]
    keyboard = [keys.row(names, f"{path} frame_{i}_y") for i, names in enumerate(held)]
    table = np.stack(rows)[:, len(NAMES) :]
    x, y = table[:, : len(MOUSE_X)] @ np.array(MOUSE_X), table[:, len(MOUSE_X) :] @ np.array(MOUSE_Y)
    degrees = np.stack([y * game.inputs.pitch_deg, x * game.inputs.yaw_deg], axis=1)
    actions = Actions(np.stack(keyboard), mouse_rows(game, degrees))
    return [HDF5Episode(path.stem, path, FPS, height, width, game.action_space, actions)]


def open_hdf5(path: Path) -> Any:
    """The file, open for reading. Raises ValueError if it is truncated or none."""
    h5py = import_extra("h5py", "CS:GO recordings")
    try:
        return h5py.File(storage.opened(path) if storage.is_s3(path) else path, "r")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error}); it is truncated or no HDF5") from error


def count_frames(file: Any, path: Path) -> int:
    """How many frames a file has; all of them, from 0 on, with picture and row."""
    count = sum(name.startswith("frame_") and name.endswith("_x") for name in file)
    for i in range(count):
        for name in (f"frame_{i}_x", f"frame_{i}_y"):
            if name not in file:
                raise ValueError(f"{path} has {count} pictures, but no {name}")
    if not count:
        raise ValueError(f"{path} holds no frame_0_x, frame_0_y, ...")
    return count


def read_picture(file: Any, i: int, path: Path) -> np.ndarray:
    """`frame_<i>_x` as (h w 3) uint8 RGB."""
    frame = read_array(file, f"frame_{i}_x", path)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"{path} frame_{i}_x is {frame.dtype} {frame.shape}, no picture (h, w, 3) of uint8")
    return np.ascontiguousarray(frame[:, :, ::-1])


def read_array(file: Any, name: str, path: Path) -> np.ndarray:
    """An array of numbers. Raises ValueError for anything else, and for one that cannot be read."""
    try:
        array = file[name]
        if not hasattr(array, "dtype") or array.dtype.kind not in "biuf":
            raise ValueError(f"{path} {name} is {array}, no numbers")
        return array[()]
    except (OSError, KeyError, RuntimeError) as error:  # what HDF5 makes of damaged data, of broken links
        raise ValueError(f"{path} {name} cannot be read ({error}); the file is damaged") from error


def read_row(file: Any, i: int, path: Path) -> np.ndarray:
    """`frame_<i>_y` (51) of 0 and 1, with one bin of each mouse axis."""
    row = read_array(file, f"frame_{i}_y", path)
    if row.shape != (WIDTH,) or not np.isin(row, (0, 1)).all():
        raise ValueError(f"{path} frame_{i}_y must be {WIDTH} values of 0 or 1")
    x, y = row[len(NAMES) : len(NAMES) + len(MOUSE_X)], row[len(NAMES) + len(MOUSE_X) :]
    if x.sum() != 1 or y.sum() != 1:
        raise ValueError(f"{path} frame_{i}_y has {x.sum():g} bins of mouse x and {y.sum():g} of mouse y; one of each")
    return row
