"""Files appear whole or not at all, and no command writes over what it reads."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import product
from pathlib import Path

import psutil

from configs.errors import FileInTheWayError, UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}\.tmp(?:\.[^.]*)?")  # of which machine, process
ABANDONED_S = 86400.0  # a temporary file of another machine that is older was left by a killed writer


@contextmanager
def temporary(path: Path, folder: bool) -> Iterator[Path]:
    """A path beside `path`, or an empty `folder`, that is deleted when the block ends. What a killed process left is
    deleted by the next one."""
    part = _part_of(path)
    try:
        if folder:
            part.mkdir()
        yield part
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:  # libraries and pipes do not name the file
            error.filename = str(path)
        raise
    finally:
        if folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and deleted when it does not.

    The temporary name keeps the suffix, for writers that look at it (ffmpeg, matplotlib). The file is synced before
    the rename: a machine that stops cannot leave an empty file under the good name.
    """
    with temporary(Path(path), folder=False) as part:
        yield part
        sync(part)
        os.replace(part, path)


@contextmanager
def atomic_files(folder: str | Path, last: str) -> Iterator[Path]:
    """An empty folder for files that appear together in `folder` when the block ends well, replacing those of the same
    names; the file `last` is there only if all others are. Of several writers, one wins with all its files."""
    folder = Path(folder)
    with temporary(folder / last, folder=True) as part:
        yield part
        names = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
        for name in names:
            sync(part / name)
            if (folder / name).is_dir():  # before anything is replaced
                raise FileInTheWayError(f"{folder / name} is a folder, and a file is to be written there")
        with _locked(folder):
            (folder / last).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: (str(name) == last, name)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part / name, folder / name)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder that becomes `folder`, in which nothing may be, when the block ends well."""
    with temporary(Path(folder), folder=True) as part:
        yield part
        for path in part.rglob("*"):
            if path.is_file():
                sync(path)
        try:
            os.rename(part, folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileInTheWayError(f"{folder} is there already; delete it, or give another out=") from error
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks `folder` for a few renames. Where a folder cannot be locked, only that moment is at risk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` atomically, as UTF-8; names of files in it that are no UTF-8 keep their bytes."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def create_file(path: str | Path, data: bytes) -> bool:
    """Writes `data` to `path` atomically unless something is there, and says whether it did."""
    with temporary(Path(path), folder=False) as part:
        part.write_bytes(data)
        sync(part)
        try:
            os.link(part, path)
        except FileExistsError:
            return False
    return True


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file as hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


config_files: list[str] = []  # YAML files that the running command was given
Read = Mapping[str, str | Path | Sequence[str | Path] | None]  # files and folders by the setting that names them


def require_other_files(outs: Iterable[str | Path], read: Read) -> None:
    """Raises UserError if one of `outs`, which a command is about to write, is a file that it reads, by any path or
    link, or lies in a folder that it reads; the command's YAML files count too.

    To be called before anything is written. Of a folder of which only some files matter, give those.
    """
    outs = [str(out) for out in outs]
    for setting, given in {**read, "config": config_files}.items():
        sources = [given] if isinstance(given, str | Path) else given or ()
        for out, source in product(outs, map(str, sources)):
            if how := _how_written(out, source):
                raise UserError(f"{out} would be written {how} {setting}={source}; give another out=")


def require_no_folder(outs: Iterable[str | Path]) -> None:
    """Raises UserError if a folder lies where a file is to be written; to be called before the work."""
    for out in outs:
        if not str(out).startswith("s3:") and Path(out).is_dir():
            raise UserError(f"{out} is a folder; give out= the name of a file")


def _how_written(out: str, source: str) -> str:
    """Whether writing `out` would write `over` or `into` the file or folder `source`; nothing if neither."""
    if out.startswith("s3:") or source.startswith("s3:"):
        targets, source = [out.rstrip("/")], source.rstrip("/")
    else:
        if os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):  # hard links too
            return "over"
        folder, name = os.path.split(os.path.abspath(out))
        targets = [os.path.join(os.path.realpath(folder), name), os.path.realpath(out)]
        source = os.path.realpath(source)
    if source in targets:
        return "over"
    return "into" if any(target.startswith(f"{source.rstrip('/')}/") for target in targets) else ""


def _is_special(path: Path) -> bool:
    """Whether `path` is a device or a pipe, or lies in /dev, where root's rename would succeed."""
    kinds = (path.is_char_device, path.is_block_device, path.is_fifo, path.is_socket)
    return Path(os.path.abspath(path)).parent == Path("/dev") or any(is_kind() for is_kind in kinds)


def _part_of(path: Path) -> Path:
    """A path beside `path` that no other process, thread or machine uses; its folder is made."""
    if str(path).startswith("s3:"):  # else a folder of that name would appear here
        raise UserError(f"{path}: this is only written to a folder of this machine, not to a bucket")
    if _is_special(path):
        raise UserError(f"{path} is a device or a pipe; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    writer = f"{machine_id()}-{os.getpid()}-{os.urandom(4).hex()}"
    stem, suffix = os.fsdecode(os.fsencode(path.stem)[:150]), path.suffix if len(path.suffix) < 20 else ""
    return path.with_name(f".{stem}.{writer}.tmp{suffix}")  # shorter than 255 bytes, also of the longest name


def sweep(folder: Path) -> None:
    """Deletes what killed writers left in `folder`."""
    for left in folder.glob(".*.tmp*"):
        with suppress(OSError):  # another process sweeps too, or the file belongs to another user
            if _is_abandoned(left):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


_sweep_once = cache(sweep)  # by a process that writes there


def _is_abandoned(path: Path) -> bool:
    if not (match := TEMPORARY.fullmatch(path.name)):
        return False
    machine, pid = match[1], int(match[2])
    if machine != machine_id():
        return time.time() - path.lstat().st_mtime > ABANDONED_S
    with suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return not psutil.pid_exists(pid)


@cache
def machine_id() -> str:
    """Eight hex digits that tell this machine or container from others: with a process id they name one process."""
    facts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def sync(path: Path) -> None:
    """Flushes the file to the disk: a machine that stops afterwards leaves no empty one."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
