"""Files appear whole or not at all."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and deleted when it does not.

    The temporary name keeps the suffix, so that writers that look at it (ffmpeg, matplotlib) work. The file is
    synced to disk before the rename, so that a machine that stops cannot leave an empty file under the good name.
    """
    path, part = Path(path), _part_of(Path(path))
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` atomically, as UTF-8."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def create_file(path: str | Path, data: bytes) -> bool:
    """Writes `data` to `path` atomically unless something is there, and says whether it did: one of all is first."""
    part = _part_of(Path(path))
    try:
        part.write_bytes(data)
        sync(part)
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file as hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _part_of(path: Path) -> Path:
    """A name beside `path` that no other process, thread or machine takes; its folder is made."""
    if str(path).startswith("s3:"):  # else a folder of that name would appear here
        raise ValueError(f"{path}: this is only written to a folder of this machine, not to a bucket")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}-{os.urandom(4).hex()}.tmp{path.suffix}")


def sync(path: Path) -> None:
    """Has the file on the disk: a machine that stops then leaves no empty one."""
    with open(path, "rb+") as written:
        os.fsync(written.fileno())
