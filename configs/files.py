"""Files appear whole or not at all."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import product
from pathlib import Path

import psutil

from configs.errors import FileError, FileInTheWayError, UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{8}\.tmp(\.[^.]*)?")
ABANDONED_S = 86400.0  # a temporary file of another machine that is older was left by a killed writer


@contextmanager
def temporary(path: Path, folder: bool) -> Iterator[Path]:
    """A path beside `path`, or an empty `folder`, that is deleted when the block ends. The next process deletes what a
    killed one left."""
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

    The temporary name keeps the suffix, so that writers that look at it (ffmpeg, matplotlib) work. The file is
    synced to disk before the rename, so that a machine that stops cannot leave an empty file under the good name.
    """
    with temporary(Path(path), folder=False) as part:
        yield part
        sync(part)
        os.replace(part, path)


@contextmanager
def atomic_files(folder: str | Path, last: str, new: bool = False) -> Iterator[Path]:
    """An empty folder for files that appear together in `folder` when the block ends well, replacing those of the same
    names; the file `last` comes after all others, so that it is there only if they are. Of several writers, one wins
    with all its files. A `new` folder must not hold any files when they appear."""
    folder = Path(folder)
    with temporary(folder / last, folder=True) as part:
        yield part
        names = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
        for name in names:
            sync(part / name)
            if (folder / name).is_dir():  # before anything is replaced
                raise FileInTheWayError(f"{folder / name} is a folder, and a file is to be written there")
        with _locked(folder):
            if new and holds_files(folder):
                raise FileInTheWayError(f"{folder} holds files of another process; choose another out=")
            (folder / last).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: (str(name) == last, name)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part / name, folder / name)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder that becomes `folder`, which must not be there, when the block ends well."""
    try:
        with temporary(Path(folder), folder=True) as part:
            yield part
            for path in part.rglob("*"):
                if path.is_file():
                    sync(path)
            os.rename(part, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileInTheWayError(f"{folder} is there already; delete it, or give another out=") from error
        raise


def holds_files(folder: Path) -> bool:
    """Whether there is anything in `folder` but unfinished files of writers, running or killed."""
    return folder.is_dir() and not all(TEMPORARY.fullmatch(path.name) for path in folder.iterdir())


@contextmanager
def sole_writer(folder: str | Path, what: str) -> Iterator[None]:
    """Locks `folder`, which is made, for a `what`: another process that asks for it meanwhile gets a UserError. A
    FileError if it cannot be written to or locked."""
    lock = Path(folder) / ".lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+", encoding="utf-8", opener=_no_link)  # noqa: SIM115 - closed below
    except OSError as error:
        raise FileError(f"cannot write to the {what} folder {folder}: {error.strerror}; choose another out=") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"{folder} is in use by the {what} of {file.read()}; choose another out=") from error
        except OSError as error:
            fix = "mount that file system with locks (Lustre: -o flock), or choose another out="
            raise FileError(f"cannot lock {lock}: {error.strerror}; {fix}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _no_link(path: str, flags: int) -> int:
    """Follows no link: the lock's file is emptied, and a link in somebody else's folder could lead to any file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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
    """Writes `text` to `path` atomically, as UTF-8."""
    data = utf8(text, path)
    with atomic_path(path) as part:
        part.write_bytes(data)


def utf8(text: str, path: str | Path) -> bytes:
    """The bytes of `text`, which `path` is to hold. A UserError for a file's name in it that is no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise UserError(f"{path} cannot hold {around!r}, which is no UTF-8; rename what is called so") from error


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


def require_other_files(outs: Iterable[str | Path], read: Read, name: str = "out") -> None:
    """Raises UserError if one of `outs`, which a command is about to write, is a file that it reads, by any path or
    link, or lies in a folder that it reads; the command's YAML files count too. The setting `name` gives `outs`.

    To be called before anything is written. Of a folder of which only some files matter, give those.
    """
    outs = [str(out) for out in outs]
    for label, given in {**read, "config": config_files}.items():
        places = [given] if isinstance(given, str | Path) else given or ()
        for out, place in product(outs, map(str, places)):
            if how := _how_written(out, place):
                raise UserError(f"{out} would be written {how} {label}={place}, which this reads; give another {name}=")


def require_no_folder(outs: Iterable[str | Path]) -> None:
    """Raises UserError if a folder lies where a file is to be written; to be called before the work."""
    for out in outs:
        if not str(out).startswith("s3:") and Path(out).is_dir():
            raise UserError(f"{out} is a folder; give out= the name of a file")


def _how_written(out: str, place: str) -> str:
    """Whether writing `out` would write `over` or `into` the file or folder `place`; nothing if neither."""
    if out.startswith("s3:") or place.startswith("s3:"):
        spots, target = [out.rstrip("/")], place.rstrip("/")
    else:
        folder, name = os.path.split(os.path.abspath(out))
        spots, target = [os.path.join(os.path.realpath(folder), name), os.path.realpath(out)], os.path.realpath(place)
    if target in spots or _same_file(out, place):
        return "over"
    return "into" if any(spot.startswith(f"{target.rstrip('/')}/") for spot in spots) else ""


def _same_file(first: str, second: str) -> bool:
    """Whether both are there and are one file: hard links."""
    with suppress(OSError):
        return os.path.samefile(first, second)
    return False


def _is_special(path: Path) -> bool:
    """Whether `path` is a device or a pipe, or lies in /dev, where root's rename would succeed."""
    if Path(os.path.abspath(path)).parent == Path("/dev"):
        return True
    # One look: another writer may delete what is there before a second one.
    with suppress(OSError):
        mode = path.stat().st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def _part_of(path: Path) -> Path:
    """A path beside `path` that no other process, thread or machine uses; its folder is made."""
    if str(path).startswith("s3:"):  # else a folder of that name would appear here
        raise UserError(f"{path}: this is only written to a folder of this machine, not to a bucket")
    if _is_special(path):
        raise UserError(f"{path} is a device or a pipe; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    writer = f"{_machine_digest()}-{os.getpid()}-{os.urandom(4).hex()}"
    stem, suffix = os.fsdecode(os.fsencode(path.stem)[:150]), path.suffix if len(path.suffix) < 20 else ""
    return path.with_name(f".{stem}.{writer}.tmp{suffix}")  # shorter than 255 bytes, also of the longest name


@cache  # once a process is often enough
def _sweep(folder: Path) -> None:
    """Deletes what killed writers left in `folder`."""
    for left in folder.glob(".*.tmp*"):
        found = TEMPORARY.fullmatch(left.name)
        with suppress(OSError):  # another process sweeps too, or the file belongs to another user
            if found and _is_left_behind(left, found["machine"], int(found["pid"])):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _is_left_behind(left: Path, machine: str, pid: int) -> bool:
    if machine == _machine_digest():
        return _has_ended(pid)
    return time.time() - left.lstat().st_mtime > ABANDONED_S


def _has_ended(pid: int) -> bool:
    """Whether there is no such process on this machine, or only its exit status."""
    with suppress(psutil.Error):
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return not psutil.pid_exists(pid)


@cache
def this_machine() -> str:
    """What tells this machine or container from all others, so that with a process id it names one process."""
    about = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        about += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(about)


@cache
def _machine_digest() -> str:
    return hashlib.sha256(this_machine().encode()).hexdigest()[:8]


def sync(path: Path) -> None:
    """Flushes the file to the disk: a machine that stops afterwards leaves no empty one."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
