"""Pictures and a key log: a folder per recording with numbered pictures and `input.csv` (`key,time,frame`).

The pictures lie in the folder or in its `frames/`; the last digits of a picture's name are its frame's number, and the
numbers leave none out. A row of `input.csv` says that `key` was held at `time` (seconds) during frame `frame`, one row
per key and frame; a frame without a row, or with a row whose key is empty, held nothing. So the rows of frame i are
action i, which leads to frame i + 1. There are no press and release events in such a log: a key that is held for ten
frames has ten rows. The times are there to be checked: they must go with the frames at the game's fps, or log and
pictures have drifted apart. There is no mouse in this format.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline import storage
from data_pipeline.pictures import read_picture
from data_pipeline.readers.keys import bind_keys, mouse_rows
from data_pipeline.readers.recording import RATE_TOLERANCE, Recording, list_files, list_folders, read_csv, read_number
from data_pipeline.types import Actions, ActionSpace, GameConfig

LOG, COLUMNS = "input.csv", ["key", "time", "frame"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class FramesEpisode:
    """One folder; pictures are decoded when asked for."""

    id: str
    pictures: tuple[Path, ...]
    fps: float
    height: int  # px
    width: int  # px
    action_space: ActionSpace
    actions: Actions

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, (h w 3) uint8 RGB, as recorded."""
        for path in self.pictures:
            frame = read_picture(path)
            if frame.shape != (self.height, self.width, 3):
                raise ValueError(f"{path} has {frame.shape[0]}x{frame.shape[1]} px, not {self.height}x{self.width}")
            yield frame


def find_recordings(source: str | Path) -> list[Recording]:
    """The folders with an `input.csv` directly in `source`; `source` itself if it has one."""
    folders = [storage.path(source)] if list_files(source, LOG) else list_folders(source)
    if not folders:
        raise ValueError(f"{source} holds no folders with pictures and {LOG}")
    return [Recording(folder.name, partial(read_folder, folder)) for folder in folders]


def read_folder(folder: Path, game: GameConfig) -> list[FramesEpisode]:
    """The one episode of `folder`.

    Raises ValueError in one line: a picture left out, a row that names no picture, times that do not go with the
    frames, a key that the game does not have.
    """
    if game.action_space.mouse:
        raise ValueError(f"{folder}: pictures with {LOG} hold no mouse; set action_space.mouse=false")
    first, pictures = number_pictures(folder)
    keys = bind_keys(game, None, "pictures with a key log")
    keyboard = np.zeros((len(pictures), len(game.action_space.keys)), dtype=np.float32)
    for where, key, frame in read_log(folder / LOG, game.fps):
        if not first <= frame < first + len(pictures):
            raise ValueError(f"{where}: no picture of frame {frame}; there are {first} to {first + len(pictures) - 1}")
        keyboard[frame - first] += keys.row([key] if key else [], where)
    actions = Actions(keyboard.clip(max=1), mouse_rows(game, np.zeros((len(pictures), 2))))
    height, width, _ = read_picture(pictures[0]).shape
    return [FramesEpisode(folder.name, pictures, game.fps, height, width, game.action_space, actions)]


def number_pictures(folder: Path) -> tuple[int, tuple[Path, ...]]:
    """The first number and the pictures in the order of their numbers."""
    inner = [path for path in list_folders(folder) if path.name == "frames"]
    numbered: dict[int, Path] = {}
    for path in list_files(inner[0] if inner else folder, *PICTURES):
        digits = re.search(r"(\d+)$", path.stem)
        if digits is None:
            raise ValueError(f"{path} has no number; pictures are called frame_000000.png, frame_000001.png, ...")
        other = numbered.setdefault(int(digits[1]), path)
        if other != path:
            raise ValueError(f"{other} and {path} have the same number")
    if not numbered:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    first = min(numbered)
    missing = [number for number in range(first, first + len(numbered)) if number not in numbered]
    if missing:
        raise ValueError(f"{folder}: frame {missing[0]} has no picture; split the recording there")
    return first, tuple(numbered[number] for number in sorted(numbered))


def read_log(path: Path, fps: float) -> Iterator[tuple[str, str, int]]:
    """File and line, key and frame of each row. Raises ValueError where time and frame drift apart."""
    header, rows = read_csv(path)
    if header != COLUMNS:
        raise ValueError(f"{path}: columns must be {','.join(COLUMNS)}, not {','.join(header)}")
    start = before = None
    for line, (key, *cells) in rows:
        where = f"{path} line {line}"
        time, frame = (read_number(cell, f"{where}: {name}") for cell, name in zip(cells, COLUMNS[1:], strict=True))
        start = start or (time, frame)
        if frame != int(frame) or (before and (time < before[0] or frame < before[1])):
            raise ValueError(f"{where}: times must ascend, and frames be whole numbers that ascend")
        before = time, frame
        drift = (time - start[0]) * fps - (frame - start[1])
        if abs(drift) > 1 + RATE_TOLERANCE * (frame - start[1]):  # keys of one frame may be logged at its two ends
            raise ValueError(
                f"{where}: since line {rows[0][0]}, {time - start[0]:g} s went by and {frame - start[1]:g} frames, "
                f"{drift:+.1f} too few at {fps:g} fps; set game.fps, or log and pictures have drifted apart"
            )
        yield where, key.strip(), int(frame)
