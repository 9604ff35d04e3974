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
TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}\.tmp")  # of which machine, process
ABANDONED_S = 86400.0  # a temporary folder of another machine that is older was left by a killed writer


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, deleted when the block ends. What a killed process left beside `path` is deleted
    by the next writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    name = os.fsdecode(os.fsencode(path.name)[:150])  # a name may have 255 bytes
    folder = path.with_name(f".{name}.{machine_id()}-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:  # libraries and pipes do not name the file
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder, renamed to `path` when the block ends well.

    The file is synced before: a machine that stops cannot leave an empty file under the good name.
    """
    path = Path(path)
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or Path(os.path.abspath(path)).parent == Path("/dev"):  # where root may rename
        raise UserError(f"{path} is a device or a pipe; give the name of a file")
    with temporary(path) as folder:
        yield folder / path.name
        sync(folder / path.name)
        os.replace(folder / path.name, path)


@contextmanager
def atomic_folder(folder: str | Path, last: str, new: bool = False) -> Iterator[Path]:
    """An empty folder for files that appear together in `folder` when the block ends well, the file `last` only after
    all others. Of several writers, one wins with all its files. In a `new` folder nothing may be; else files of the
    same names are replaced."""
    folder = Path(folder)
    with temporary(folder if new else folder / last) as part:
        yield part
        names = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
        for name in names:
            sync(part / name)
            if not new and (folder / name).is_dir():  # before anything is replaced
                raise FileInTheWayError(f"{folder / name} is a folder, and a file is to be written there")
        if new:
            _rename_new(part, folder)
            return
        lock = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # where a folder cannot be locked, only this moment is at risk
                fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / last).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: (str(name) == last, name)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part / name, folder / name)
        finally:
            os.close(lock)


def _rename_new(part: Path, folder: Path) -> None:
    try:
        os.rename(part, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileInTheWayError(f"{folder} is there already; delete it, or give another out=") from error
        raise


def create_file(path: str | Path, data: bytes) -> bool:
    """Writes `data` to `path` atomically unless something is there, and says whether it did."""
    with temporary(Path(path)) as folder:
        part = folder / "data"
        part.write_bytes(data)
        sync(part)
        try:
            os.link(part, path)
        except FileExistsError:
            return False
    return True


config_files: list[str] = []  # YAML files that the running command was given
Sources = Mapping[str, str | Path | Sequence[str | Path] | None]  # files and folders by the setting that names them


def require_other_files(outs: Iterable[str | Path], read: Sources) -> None:
    """Raises UserError if one of `outs`, which a command is about to write, is a file that it reads, by any path or
    link, or lies in a folder that it reads; the command's YAML files count too.

    To be called before anything is written. Of a folder of which only some files matter, give those.
    """
    outs = [str(out) for out in outs]
    for setting, paths in {**read, "config": config_files}.items():
        sources = [paths] if isinstance(paths, str | Path) else paths or ()
        for out, source in product(outs, map(str, sources)):
            if _is_part_of(out, source):
                raise UserError(f"{out} would change {setting}={source}, which is read; give another out=")


def require_no_folder(outs: Iterable[str | Path]) -> None:
    """Raises UserError if a folder lies where a file is to be written; to be called before the work."""
    for out in outs:
        if not str(out).startswith("s3:") and Path(out).is_dir():
            raise UserError(f"{out} is a folder; give out= the name of a file")


def _is_part_of(out: str, source: str) -> bool:
    """Whether `out` is the file or folder `source`, by any path or link, or lies in it."""
    targets = [out]
    if not out.startswith("s3:") and not source.startswith("s3:"):
        if os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):  # hard links too
            return True
        folder, name = os.path.split(os.path.abspath(out))
        targets = [os.path.join(os.path.realpath(folder), name), os.path.realpath(out)]
        source = os.path.realpath(source)
    return any(f"{target.rstrip('/')}/".startswith(f"{source.rstrip('/')}/") for target in targets)


def sweep(folder: Path) -> None:
    """Deletes what killed writers left in `folder`."""
    for left in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)


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
