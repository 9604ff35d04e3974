"""Files of others: read as plain values, one line for a damaged one, and no name in them leads out of its folder."""

import csv
import json
import math
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

from configs.errors import UserError

# What parsers make of a damaged or hostile file. Elsewhere these are faults of ours and keep their traceback.
DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError, EOFError,
    struct.error, zipfile.BadZipFile, csv.Error, pickle.UnpicklingError, yaml.YAMLError, OmegaConfBaseException,
)  # fmt: skip
SETTINGS_BYTES = 512 << 10  # of a file of settings; a larger one is none, and 16 MiB take a minute to parse


@contextmanager
def reading(where: str | Path, remedy: str = "copy, download or write it again") -> Iterator[None]:
    """The one place where a foreign file's damage becomes one line: whatever the block makes of its contents is a
    ValueError that begins with `where`, its name. Errors that name it already, and of the disk, stay as they are."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, ValueError) and str(where) in str(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{where} is damaged ({said or type(error).__name__}); {remedy}") from error


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """Whatever the JSON `text` is, its numbers finite and its texts such as can be written in a file or a message.

    Raises ValueError in one line that begins with `where`.
    """
    try:
        plain = bytes(text).decode("utf-8-sig") if isinstance(text, bytes | bytearray | memoryview) else text
        loaded = json.loads(plain, parse_constant=_finite, parse_float=_finite)
        if "\\u" in plain:  # only so is half of a character written, which no encoding has
            json.dumps(loaded, ensure_ascii=False).encode()
        return loaded
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {' '.join(str(error).split())[:200]}") from error


def parse_object(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """The object that the JSON `text` is; see `parse_json`."""
    loaded = parse_json(text, where)
    if not isinstance(loaded, dict):
        raise UserError(f"{where} must hold keys and values at its top level")
    return loaded


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise UserError(f"{text} is no finite number")
    return number


def require_inside(name: str, where: str | Path) -> str:
    """`name`, if it is a plain relative path that stays in its folder. `where`, a folder or file, named it.

    Raises ValueError for one that is absolute or empty, has a part `.`, `..` or none, a backslash or a control
    character.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 or c in "\\\x7f" for c in name):
        raise UserError(f"{where} names {name!r}, which is no file of a folder; it was not read or written")
    return name


def inside(folder: Path, name: str, where: str | Path | None = None) -> Path:
    """The path of `name` in `folder`, where it also lies once links are followed. Raises as `require_inside`."""
    path = folder / require_inside(name, where or folder)
    if isinstance(folder, Path):  # an s3:// path has no links
        real = Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for links in a circle
        if not real.is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{where or folder} names {name!r}, which lies in {real}; it was not read or written")
    return path
