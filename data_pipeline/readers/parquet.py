"""Rows of parquet files, as LeRobot's datasets hold them."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.foreign import reading
from data_pipeline.readers.recording import import_extra


def read_rows(path: Path, columns: Sequence[str], only: tuple[str, int] | None = None) -> list[dict[str, Any]]:
    """The rows of a parquet file as plain values: `columns`, and all that begin with those that end in a slash.

    With `only` a column and a number, the rows that have it there; the two files last read so are kept, since many
    episodes share one. Raises ValueError for a file that is none, or lacks one of `columns`.
    """
    compute = import_extra("pyarrow.compute", "LeRobot recordings")
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    with _reading_parquet(path):
        if only is None:
            return _read_table(path, columns).to_pylist()
        table = _kept_table(path, (*columns, only[0]), storage.version(path))
        return table.filter(compute.equal(table[only[0]], only[1])).to_pylist()


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    arrow = import_extra("pyarrow", "LeRobot recordings")
    with reading(path):
        try:
            yield
        except (OSError, arrow.ArrowException) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"cannot read {path} ({said}); it is truncated or no parquet file") from error


@lru_cache(maxsize=2)
def _kept_table(path: Path, columns: Sequence[str], version: Hashable) -> Any:
    return _read_table(path, columns)


def _read_table(path: Path, columns: Sequence[str]) -> Any:
    parquet = import_extra("pyarrow.parquet", "LeRobot recordings")
    with storage.open(path) as file:
        names = parquet.read_schema(file).names
    wanted = [name for name in names if name in columns or name.startswith(tuple(c for c in columns if c[-1] == "/"))]
    missing = [name for name in columns if name not in wanted and name[-1] != "/"]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}")
    with storage.open(path) as file:
        return parquet.read_table(file, columns=wanted)
