"""Untrusted files: read as plain values, one line for a damaged one, and no path in them leads out of its folder."""

import csv
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from configs.errors import UserError, one_line

# What parsers raise for a damaged or hostile file. Elsewhere these are bugs of ours and keep their traceback.
DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError, EOFError,
    struct.error, zipfile.BadZipFile, csv.Error, pickle.UnpicklingError, yaml.YAMLError, OmegaConfBaseException,
)  # fmt: skip
SETTINGS_BYTES = 512 << 10  # the largest file of settings; 16 MiB take a minute to parse


@contextmanager
def reading(where: str | Path, remedy: str = "copy, download or write it again") -> Iterator[None]:
    """Turns what a parser raises for the damaged file `where` into a UserError that names it. Errors that name it
    already, and those of the disk, stay as they are."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, UserError) and str(where) in str(error):
            raise
        raise UserError(f"{where} is damaged ({one_line(error)[:200]}); {remedy}") from error


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """The value of the JSON `text`: its numbers are finite, its strings encodable. Errors begin with `where`."""
    try:
        plain = bytes(text).decode("utf-8-sig") if isinstance(text, bytes | bytearray | memoryview) else text
        loaded = json.loads(plain)
        json.dumps(loaded, allow_nan=False, ensure_ascii=False).encode()  # raises for half of a surrogate pair, too
        return loaded
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {one_line(error)[:200]}") from error


def parse_object(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in `text`; see `parse_json`."""
    loaded = parse_json(text, where)
    if not isinstance(loaded, dict):
        raise UserError(f"{where} must hold keys and values at its top level")
    return loaded


def require_inside(name: str, where: str | Path) -> str:
    """`name`, which `where` holds, if it is a plain path that stays in its folder: not absolute, no empty part, no `.`
    or `..`, no backslash, no control character. Else a UserError."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c in "\\\x7f" for c in name):
        raise UserError(f"{where} names {name!r}, which is no file of a folder; it was not read or written")
    return name


def inside(folder: Path, name: str, where: str | Path | None = None) -> Path:
    """The path of `name` in `folder`, checked as by `require_inside` and once links are followed."""
    path = folder / require_inside(name, where or folder)
    if isinstance(folder, Path):  # an s3:// path has no links
        real = Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for links in a circle
        if not real.is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{where or folder} names {name!r}, which lies in {real}; it was not read or written")
    return path
