"""Logs of recordings as text: JSON files, and tables (.csv or .jsonl) whose errors name file, line and column."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from configs import build_from, storage
from configs.errors import MissingFileError, UserError
from configs.untrusted import parse_object, reading
from data_pipeline.types import Footage

T = TypeVar("T")
LARGEST = float(np.finfo(np.float32).max)  # rows of actions are float32
LOG_BYTES, EVENT_BYTES = 1 << 29, 1 << 36  # a larger log is none; of events: days of a mouse


class Row(NamedTuple):
    """One row of a table."""

    where: str  # file and line
    cells: Mapping[str, Any]  # by column

    def cell(self, column: str) -> Any:
        if column not in self.cells:
            raise UserError(f"{self.where} has no column {column!r:.80}, but {', '.join(map(str, self.cells)):.300}")
        return self.cells[column]

    def number(self, column: str) -> float:
        return read_number(self.cell(column), f"{self.where}: {column}")

    def count(self, column: str) -> int:
        """A whole number from 0 on."""
        value = self.cell(column)
        if type(value) is not int or value < 0:
            raise UserError(f"{self.where}: {column} is {value!r:.80}, which is no count")
        return value

    def down(self, column: str) -> bool:
        """Whether the key of this column is held."""
        value = self.cell(column)
        number = {"true": 1, "false": 0}.get(str(value).strip().casefold())
        number = self.number(column) if number is None else number
        if number not in (0, 1):
            raise UserError(f"{self.where}: {column} is {value!r:.80}; a key must be 0, 1, true or false")
        return number == 1


@contextmanager
def open_text(path: Path, most_bytes: int = LOG_BYTES) -> Iterator[io.TextIOWrapper]:
    """The text of a file. Whatever is wrong with it in the block becomes one UserError that names it."""
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    if (size := storage.path(path).stat().st_size) > most_bytes:
        raise UserError(f"{path} has {size} bytes; a log of a recording has at most {most_bytes}")
    # Bytes that are not UTF-8 become \xff, so that the row can be named, and rows that do not count may hold any.
    with reading(path), storage.open(path) as file:
        yield io.TextIOWrapper(file, "utf-8-sig", "backslashreplace", newline="")


def read_text(path: Path) -> str:
    with open_text(path) as text:
        return text.read()


def read_facts(cls: type[T], path: Path) -> T:
    """The dataclass `cls` from the object in a JSON file, which may hold more."""
    names = [field.name for field in fields(cast(Any, cls))]
    values = parse_object(read_text(path), path)
    return build_from(cls, {name: value for name, value in values.items() if name in names}, path)


def read_rows(log: Path, most_bytes: int = LOG_BYTES) -> Iterator[Row]:
    """The rows of a .csv with a header, or of a .jsonl; empty lines are left out."""
    with open_text(log, most_bytes) as text:
        if log.suffix.lower() != ".csv":
            lines = ((f"{log} line {number}", line) for number, line in enumerate(text, 1) if line.strip())
            yield from (Row(where, parse_object(line, where)) for where, line in lines)
            return
        lines = read_cells(log, text)
        header = [name.strip() for name in next(lines, ("", []))[1]]
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise UserError(f"{log} has two columns {twice[0]!r:.80}")
        for where, cells in lines:
            if len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, the header has {len(header)}")
            yield Row(where, dict(zip(header, cells, strict=True)))


def read_cells(log: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, list[str]]]:
    """File and line, and the cells, of each line of a .csv, the header too; empty lines are left out."""
    reader = csv.reader(text)
    try:
        yield from ((f"{log} line {reader.line_num}", cells) for cells in reader if cells)
    except csv.Error as error:
        raise UserError(f"{log} line {reader.line_num}: {error}") from error


def read_frame_rows(log: Path, footage: Footage, spare: int = 0) -> list[Row]:
    """The rows of a log, one per frame; the last `spare` frames may have none. Surplus rows are counted, not kept."""
    rows = read_rows(log)
    kept = list(islice(rows, footage.frames))
    check_row_count(log, len(kept) + sum(1 for _ in rows), footage, spare)
    return kept


def check_row_count(log: Path, rows: int, footage: Footage, spare: int = 0) -> None:
    """A UserError if a log has not one row per frame: then it is unknown which row belongs to which frame."""
    if not rows or not footage.frames - spare <= rows <= footage.frames:
        raise UserError(f"{log} has {rows} rows, {footage.path} has {footage.frames} frames; give each frame a row")


def check_frame_numbers(rows: Sequence[Row], column: str, first: float | None = None) -> None:
    """A UserError unless `column` counts up by one, from `first` or wherever it begins."""
    for i, row in enumerate(rows):
        number = row.number(column)
        first = number if first is None else first
        if number != first + i:
            raise UserError(f"{row.where}: {column} must be {first + i:g}, not {number:g}; a frame is missing")


def read_number(value: Any, where: str) -> float:
    """A number that float32 can hold, given as one or as its text; `where` names it in errors."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST or isinstance(value, bool):
        limit = f" up to {LARGEST:.2g}" if abs(number) > LARGEST else ""
        raise UserError(f"{where} is {value!r:.80}, which is no number{limit}")
    return number
