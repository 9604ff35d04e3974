"""A video with a table that has one row per frame, by any recorder: `<name>.mp4` and `<name>.csv` or `.jsonl`.

Pairs lie in one folder, or each in a folder of its own, which names it then. Row i is what was done while frame i was
on the screen, so it is action i and leads to frame i + 1; there are as many rows as frames. Columns are found by name:

Keys: `game.inputs.keys` binds keys to columns, which hold 0, 1, true or false; without it a key's column has its name.
Or `game.inputs.columns.keys` names one column that lists what is held: a list in a jsonl, a text such as `w space` or
`["w", "space"]`; its words are bound by `game.inputs.keys`, and others are an error or left out, by `others`.
Mouse: `columns.dx` and `columns.dy` (`dx`, `dy`), to the right and down; a unit is `yaw_deg` and `pitch_deg` degrees.
Frame: `columns.frame`, if it is given, must count up by one from row to row, wherever it begins.

Other columns are passed over.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.foreign import parse_object
from configs.game import GameConfig
from data_pipeline.readers.keys import bind_keys, mouse_rows, require_mouse_scale
from data_pipeline.readers.recording import (
    VIDEOS,
    Recording,
    VideoEpisode,
    check_rows,
    cut_video,
    find_pairs,
    list_files,
    list_folders,
    probe_video,
    read_csv,
    read_number,
    read_text,
    say_left_out,
)
from data_pipeline.types import Actions

TABLES, WHAT = (".csv", ".jsonl"), "tables"
ROLES = ("keys", "dx", "dy", "frame")
WORD = re.compile(r"""[^\s,;+|"'\[\]]+""")  # of a text that lists keys
DOWN = {"true": 1.0, "false": 0.0}


class Row(NamedTuple):
    """One row of a table."""

    where: str  # file and line
    cells: Mapping[str, Any]  # by column

    def cell(self, column: str) -> Any:
        if column not in self.cells:
            there = ", ".join(map(str, self.cells))
            raise UserError(f"{self.where} has no column {column!r}, but {there:.300}; see game.inputs.keys, columns")
        return self.cells[column]

    def number(self, column: str) -> float:
        return read_number(self.cell(column), f"{self.where}: {column}")

    def down(self, column: str) -> bool:
        value = self.cell(column)
        number = float(value) if isinstance(value, bool) else DOWN.get(str(value).strip().casefold())
        number = self.number(column) if number is None else number
        if number not in (0, 1):
            raise UserError(f"{self.where}: {column} is {value!r:.80}; a key must be 0, 1, true or false")
        return bool(number)

    def words(self, column: str) -> list[str]:
        """What a column lists."""
        value = self.cell(column)
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            return value
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.where}: {column} is {value!r:.80}; it must list the names of keys")
        return WORD.findall(value or "")


def find_recordings(source: str | Path) -> list[Recording]:
    """The videos in `source` with a table of their name; or the folders in it with a video and a table each."""
    files = list_files(source, *VIDEOS, *TABLES) if list_files(source, *VIDEOS) else []  # one may list the folders
    if len(files) > 2 or (files and len({path.stem for path in files}) == 1):
        return find_pairs(storage.path(source), storage.path(source), TABLES, read_pair)
    inner = [storage.path(source)] if files else list_folders(source)
    folders = [folder for folder in inner if list_files(folder, *VIDEOS, *TABLES)]
    say_left_out(source, [folder for folder in inner if folder not in folders], "without a video and a table")
    if not folders:
        raise UserError(f"{source} holds no videos with a table ({', '.join(TABLES)}) each")
    return [Recording(folder.name, partial(read_folder, folder)) for folder in folders]


def read_folder(folder: Path, game: GameConfig) -> list[VideoEpisode]:
    """The one episode of a folder, by the folder's name; raises as `read_pair`."""
    videos, tables = (list_files(folder, *suffixes) for suffixes in (VIDEOS, TABLES))
    if len(videos) != 1 or len(tables) != 1:
        raise UserError(f"{folder} must hold one video and one table, not {len(videos)} and {len(tables)}")
    return read_pair(videos[0], tables[0], game, folder.name)


def read_pair(video: Path, table: Path, game: GameConfig, name: str | None = None) -> list[VideoEpisode]:
    """The one episode of a video and its table.

    Raises ValueError in one line, with the table's line and column: rows and frames that are not as many, another fps,
    a column that is not there, a cell that is no number or no key of the game.
    """
    unknown = [role for role in game.inputs.columns if role not in ROLES]
    if unknown:
        raise UserError(f"game.inputs.columns has no {unknown[0]!r} in {WHAT}; there are {', '.join(ROLES)}")
    require_mouse_scale(game, WHAT)
    info, rows = probe_video(video, game), read_rows(table)
    check_rows(table, len(rows), video, info)
    if "frame" in game.inputs.columns:
        _check_count(rows, game.inputs.columns["frame"])
    actions = Actions(hold_keys(rows, game), read_mouse(rows, game))
    return cut_video(name or video.stem, video, info, game, actions, [(0, len(rows))])


def read_rows(table: Path) -> list[Row]:
    """The rows of a table; empty lines are left out."""
    if table.suffix.lower() == ".jsonl":
        lines = enumerate(read_text(table).split("\n"), start=1)
        where = ((f"{table} line {number}", line) for number, line in lines if line.strip())
        return [Row(place, parse_object(line, place)) for place, line in where]
    header, rows = read_csv(table)
    twice = [column for column, count in Counter(header).items() if column and count > 1]
    if twice:
        raise UserError(f"{table} has two columns {twice[0]!r:.80}")
    return [Row(f"{table} line {line}", dict(zip(header, row, strict=True))) for line, row in rows]


def hold_keys(rows: Sequence[Row], game: GameConfig) -> np.ndarray:
    """The keyboard vectors (n k)."""
    keys, listed = bind_keys(game, None, WHAT), game.inputs.columns.get("keys")
    held = [row.words(listed) if listed else [column for column in keys.places if row.down(column)] for row in rows]
    return np.stack([keys.row(names, row.where) for names, row in zip(held, rows, strict=True)])


def read_mouse(rows: Sequence[Row], game: GameConfig) -> np.ndarray:
    """The mouse vectors (n 2); (n 0) for a game without a mouse."""
    if not game.action_space.mouse:
        return mouse_rows(game, np.zeros((len(rows), 2)))
    axes = [(role, game.inputs.columns.get(role, role)) for role in ("dy", "dx")]
    scale = game.inputs.pitch_deg, game.inputs.yaw_deg
    degrees = np.array([[row.number(column) for _, column in axes] for row in rows], dtype=np.float64) * scale
    return mouse_rows(game, degrees, lambda i: f"{rows[i].where}: {axes[0][1]}, {axes[1][1]}")


def _check_count(rows: Sequence[Row], column: str) -> None:
    numbers = [row.number(column) for row in rows]
    for row, number, expected in zip(rows, numbers, range(len(rows)), strict=True):
        if number != numbers[0] + expected:
            raise UserError(
                f"{row.where}: {column} must be {numbers[0] + expected:g}, not {number:g}; a frame is missing"
            )
