"""Shard sets in tests: the commands about them, their clips, all their bytes, and ways to spoil them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.cli import run
from data_pipeline.__main__ import VERBS
from data_pipeline.shard_set import Shards
from data_pipeline.types import Clip


def data(capsys: pytest.CaptureFixture[str], *args: object, status: int = 0) -> list[str]:
    """The lines that `python -m data_pipeline ARGS` prints; on stderr, with status 2, it is one."""
    capsys.readouterr()
    assert run("data_pipeline", VERBS, [str(arg) for arg in args]) == status
    printed = capsys.readouterr()
    lines = (printed.err if status == 2 else printed.out).splitlines()
    assert status != 2 or (len(lines) == 1 and len(lines[0]) < 600)
    return lines


def read_clips(manifest: str | Path, limit: int | None = None) -> list[Clip]:
    """The first `limit` clips of a set (all if None) in the manifest's order, first frames included."""
    shards = Shards(manifest)
    return [shards.clip(number) for number in range(len(shards))[:limit]]


def read_tree(folder: str | Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Changes what a JSON file holds."""
    loaded = json.loads(path.read_text())
    change(loaded)
    path.write_text(json.dumps(loaded))


def alter(path: Path, byte: int = 3000) -> None:
    """Flips a bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)
