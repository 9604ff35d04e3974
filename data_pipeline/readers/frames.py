"""Pictures and a key log: a folder per recording with numbered pictures and `input.csv` (`key,time,frame`).

The pictures lie in the folder or in its `frames/`; the last digits of a picture's name are its frame's number, and the
numbers leave none out. A row of `input.csv` says that `key` was held at `time` (seconds) during frame `frame`; a frame
without a row, or with a row whose key is empty or `=`, held nothing. So the rows of frame i are action i, which leads
to frame i + 1. There are no press and release events in such a log: a key that is held for ten frames has ten rows. The
times are there to be checked: they must go with the frames at the game's fps, or log and pictures have drifted apart.
There is no mouse in this format.

Keys may be in either case, and several in one cell (`WA`). With the header `key,time,frame` the rows of a frame add up,
one per key that is held. Without a header a row is all that was held, and of several rows of one frame the last counts:
the program that this format comes from writes and reads them so.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.pictures import read_picture
from data_pipeline.readers.keys import INPUTS, KeyMap, bind_keys, mouse_rows
from data_pipeline.readers.logs import open_text, read_cells, read_number
from data_pipeline.readers.recording import RATE_TOLERANCE, Format, cut_episodes, find_folders, list_files
from data_pipeline.types import Actions, Episode, Footage

LOG, COLUMNS = "input.csv", ["key", "time", "frame"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NOTHING, BETWEEN = ("", "="), " +,;|/&"  # in a cell without a key; between several
# Names of one key, not several letters.
WORDS = INPUTS | {"shift", "ctrl", "control", "alt", "esc", "return", "del", "ins", "cmd", "win", "fn", "caps", "altgr"}


def find_recordings(source: str | Path) -> dict[str, Path]:
    """The folders with an `input.csv` or pictures directly in `source`; `source` itself if it has an `input.csv`."""
    folder = storage.path(source)
    if (folder / LOG).is_file():
        return {folder.name: folder}
    return find_folders(source, f"pictures and {LOG}", lambda inner: list_files(inner, f"/{LOG}") or _pictures(inner))


def read_folder(name: str, folder: Path, game: GameConfig) -> list[Episode]:
    """The one episode of `folder`."""
    if game.action_space.mouse:
        raise UserError(f"{folder}: pictures with {LOG} hold no mouse; set action_space.mouse=false")
    first, pictures = number_pictures(folder)
    keys, last = bind_keys(game), first + len(pictures) - 1
    keyboard = np.zeros((len(pictures), len(game.action_space.keys)), dtype=np.float32)
    for where, cell, frame, adds_up in read_log(folder / LOG, game.fps):
        if not first <= frame <= last:
            raise UserError(f"{where}: no picture of frame {frame}; there are {first} to {last}")
        held = keys.row(split_keys(cell, keys, where), where)
        keyboard[frame - first] = np.maximum(keyboard[frame - first], held) if adds_up else held
    height, width, _ = read_picture(pictures[0]).shape
    read = partial(read_pictures, pictures, (height, width))
    footage = Footage(folder, len(pictures), height, width, read, is_video=False)
    return cut_episodes(name, footage, Actions(keyboard, mouse_rows(game.action_space, np.zeros((len(pictures), 2)))))


FORMAT = Format(find_recordings, read_folder)


def read_pictures(pictures: Sequence[Path], size: tuple[int, int], start: int, stop: int) -> Iterator[np.ndarray]:
    """Frames `start` to before `stop` (h w 3) uint8, all of one `size` (h w)."""
    for path in pictures[start:stop]:
        frame = read_picture(path)
        if frame.shape[:2] != size:
            raise UserError(f"{path} has {frame.shape[0]}x{frame.shape[1]} px, not {size[0]}x{size[1]}")
        yield frame


def _pictures(folder: Path) -> list[Path]:
    inner = folder / "frames"
    return list_files(inner if inner.is_dir() else folder, *PICTURES)


def number_pictures(folder: Path) -> tuple[int, list[Path]]:
    """The first number and the pictures in the order of their numbers."""
    numbered = sorted((_number(path), path) for path in _pictures(folder))
    if not numbered:
        raise UserError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    first = numbered[0][0]
    for frame, (number, path) in enumerate(numbered, first):
        if number > frame:
            raise UserError(f"{folder}: frame {frame} has no picture; split the recording there")
        if number < frame:
            raise UserError(f"{numbered[frame - first - 1][1]} and {path} have the same number")
    return first, [path for _, path in numbered]


def _number(picture: Path) -> int:
    digits = re.search(r"(\d+)$", picture.stem)
    if digits is None:
        raise UserError(f"{picture} has no number; pictures are called frame_000000.png, frame_000001.png, ...")
    return int(digits[1])


def split_keys(cell: str, keys: KeyMap, where: str) -> list[str]:
    """The inputs that a cell of the log names: none, one, or several letters; bound ones as they are bound.

    A UserError for a long unknown word of which some letters are bound: a bound key is never left out.
    """
    name = "space" if cell == " " else cell.strip()
    if name in NOTHING:
        return []
    whole = keys.spell(name, where)
    if whole in keys.elements or name.casefold() in WORDS:
        return [whole]
    letters = [keys.spell(letter, where) for letter in name if letter not in BETWEEN]
    unbound = [letter for letter in letters if letter not in keys.elements]
    if len(unbound) == len(letters):
        return [name]
    if unbound and len(letters) > 3:
        raise UserError(f"{where}: {name[:80]!r} may be one key or several, some of them bound; give each its own row")
    return letters


def read_log(path: Path, fps: float) -> Iterator[tuple[str, str, int, bool]]:
    """File and line, key and frame of each row, and whether the rows of a frame add up.

    A UserError where time and frame drift apart.
    """
    start = before = None
    header = False
    with open_text(path) as text:
        for number, (where, cells) in enumerate(read_cells(path, text)):
            if number == 0 and [name.strip() for name in cells] == COLUMNS:
                header = True
                continue
            if len(cells) != len(COLUMNS):
                raise UserError(f"{where}: {len(cells)} cells; columns must be {','.join(COLUMNS)}")
            time, frame = (read_number(cells[i], f"{where}: {COLUMNS[i]}") for i in (1, 2))
            start, before = start or (time, frame), before or (time, frame)
            if frame != int(frame) or time < before[0] or frame < before[1]:
                raise UserError(f"{where}: times must ascend, and frames be whole numbers that ascend")
            before = time, frame
            drift = (time - start[0]) * fps - (frame - start[1])
            if abs(drift) > 1 + RATE_TOLERANCE * (frame - start[1]):  # keys of one frame may be logged at its two ends
                apart = f"times and frames drift apart by {drift:+.1f} frames at {fps:g} fps"
                raise UserError(f"{where}: {apart}; set game.fps, or split the recording")
            yield where, cells[0], int(frame), header
