"""Pictures and a key log: a folder per recording with numbered pictures and `input.csv` (`key,time,frame`).

The pictures lie in the folder or in its `frames/`; the last digits of a picture's name are its frame's number, and the
numbers leave none out. A row of `input.csv` says that `key` was held at `time` (seconds) during frame `frame`; a frame
without a row, or with a row whose key is empty or `=`, held nothing. So the rows of frame i are action i, which leads
to frame i + 1. There are no press and release events in such a log: a key that is held for ten frames has ten rows. The
times are there to be checked: they must go with the frames at the game's fps, or log and pictures have drifted apart.
There is no mouse in this format.

Keys may be in either case, and several in one cell (`WA`). With the header `key,time,frame` the rows of a frame add up,
one per key that is held. Without a header a row is all that was held, and of several rows of one frame the last counts:
so does the program write and read them that this format comes from.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.game import ActionSpace, GameConfig
from data_pipeline.pictures import read_picture
from data_pipeline.readers.keys import INPUTS, KeyMap, bind_keys, mouse_rows
from data_pipeline.readers.recording import (
    RATE_TOLERANCE,
    Recording,
    list_files,
    list_folders,
    read_csv,
    read_number,
    say_left_out,
)
from data_pipeline.types import Actions

LOG, COLUMNS = "input.csv", ["key", "time", "frame"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NOTHING, BETWEEN = ("", "="), " +,;|/&"  # in a cell without a key; between several
# Names of one key, not several letters.
WORDS = INPUTS | {"shift", "ctrl", "control", "alt", "esc", "return", "del", "ins", "cmd", "win", "fn", "caps", "altgr"}


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
                raise UserError(f"{path} has {frame.shape[0]}x{frame.shape[1]} px, not {self.height}x{self.width}")
            yield frame


def find_recordings(source: str | Path) -> list[Recording]:
    """The folders with an `input.csv` or pictures directly in `source`; `source` itself if it has an `input.csv`."""
    inner = [storage.path(source)] if (storage.path(source) / LOG).is_file() else list_folders(source)
    folders = [folder for folder in inner if (folder / LOG).is_file() or list_pictures(folder)]
    say_left_out(source, [folder for folder in inner if folder not in folders], f"without pictures and {LOG}")
    if not folders:
        raise UserError(f"{source} holds no folders with pictures and {LOG}")
    return [Recording(folder.name, partial(read_folder, folder)) for folder in folders]


def read_folder(folder: Path, game: GameConfig) -> list[FramesEpisode]:
    """The one episode of `folder`.

    Raises ValueError in one line: a picture left out, a row that names no picture, times that do not go with the
    frames, a key that the game does not have.
    """
    if game.action_space.mouse:
        raise UserError(f"{folder}: pictures with {LOG} hold no mouse; set action_space.mouse=false")
    if not (folder / LOG).is_file():
        raise UserError(f"{folder} has pictures, but no {LOG}")
    first, pictures = number_pictures(folder)
    keys = bind_keys(game, None, "pictures with a key log")
    keyboard = np.zeros((len(pictures), len(game.action_space.keys)), dtype=np.float32)
    add_up, rows = read_log(folder / LOG, game.fps)
    for where, cell, frame in rows:
        if not first <= frame < first + len(pictures):
            raise UserError(f"{where}: no picture of frame {frame}; there are {first} to {first + len(pictures) - 1}")
        held = keys.row(split_keys(cell, keys, where), where)
        keyboard[frame - first] = np.maximum(keyboard[frame - first], held) if add_up else held
    actions = Actions(keyboard, mouse_rows(game, np.zeros((len(pictures), 2))))
    height, width, _ = read_picture(pictures[0]).shape
    return [FramesEpisode(folder.name, pictures, game.fps, height, width, game.action_space, actions)]


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a recording, by name."""
    inner = [path for path in list_folders(folder) if path.name == "frames"]
    return list_files(inner[0] if inner else folder, *PICTURES)


def number_pictures(folder: Path) -> tuple[int, tuple[Path, ...]]:
    """The first number and the pictures in the order of their numbers."""
    numbered: dict[int, Path] = {}
    for path in list_pictures(folder):
        digits = re.search(r"(\d+)$", path.stem)
        if digits is None:
            raise UserError(f"{path} has no number; pictures are called frame_000000.png, frame_000001.png, ...")
        other = numbered.setdefault(int(digits[1]), path)
        if other != path:
            raise UserError(f"{other} and {path} have the same number")
    if not numbered:
        raise UserError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    first = min(numbered)
    missing = [number for number in range(first, first + len(numbered)) if number not in numbered]
    if missing:
        raise UserError(f"{folder}: frame {missing[0]} has no picture; split the recording there")
    return first, tuple(numbered[number] for number in sorted(numbered))


def split_keys(cell: str, keys: KeyMap, where: str) -> list[str]:
    """The inputs that a cell of the log names: none, one, or several that are letters; bound ones as they are bound.

    Raises ValueError where one letter of a long word that nobody knows is bound: nothing that is bound is left out.
    """
    name = "space" if cell == " " else cell.strip()
    if name in NOTHING:
        return []
    whole = keys.spell(name, where)
    if whole in keys.places or name.casefold() in WORDS:
        return [whole]
    letters = [keys.spell(letter, where) for letter in name if letter not in BETWEEN]
    unbound = [letter for letter in letters if letter not in keys.places]
    if len(unbound) == len(letters):
        return [name]
    if unbound and len(letters) > 3:
        raise UserError(
            f"{where}: {name[:80]!r} may be one key or several, some of them bound; bind it in game.inputs.keys, or "
            "give each key a row of its own"
        )
    return letters


def read_log(path: Path, fps: float) -> tuple[bool, Iterator[tuple[str, str, int]]]:
    """Whether the rows of a frame add up; file and line, key and frame of each row."""
    header, rows = read_csv(path)
    if header == COLUMNS:
        return True, _check_rows(path, rows, fps)
    try:
        _read_place(header, f"{path} line 1")
    except ValueError:
        raise UserError(f"{path}: columns must be {','.join(COLUMNS)}, not {','.join(header):.200}") from None
    return False, _check_rows(path, [(1, header), *rows], fps)


def _check_rows(path: Path, rows: list[tuple[int, list[str]]], fps: float) -> Iterator[tuple[str, str, int]]:
    """File and line, key and frame of each row. Raises ValueError where time and frame drift apart."""
    start = before = None
    for line, cells in rows:
        where = f"{path} line {line}"
        time, frame = _read_place(cells, where)
        start = start or (time, frame)
        if frame != int(frame) or (before and (time < before[0] or frame < before[1])):
            raise UserError(f"{where}: times must ascend, and frames be whole numbers that ascend")
        before = time, frame
        drift = (time - start[0]) * fps - (frame - start[1])
        if abs(drift) > 1 + RATE_TOLERANCE * (frame - start[1]):  # keys of one frame may be logged at its two ends
            raise UserError(
                f"{where}: since line {rows[0][0]}, {time - start[0]:g} s went by and {frame - start[1]:g} frames, "
                f"{drift:+.1f} too few at {fps:g} fps; set game.fps, or log and pictures have drifted apart"
            )
        yield where, cells[0], int(frame)


def _read_place(cells: list[str], where: str) -> tuple[float, float]:
    """The time and the frame of a row."""
    if len(cells) != len(COLUMNS):
        raise UserError(f"{where}: {len(cells)} cells, there must be {','.join(COLUMNS)}")
    return read_number(cells[1], f"{where}: time"), read_number(cells[2], f"{where}: frame")
