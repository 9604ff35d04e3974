"""Copies of a bucket's files on this machine, and files on their way to it, in `$WORLDLOOM_CACHE`.

Copies are kept from run to run up to `$WORLDLOOM_CACHE_GB` (50). The least recently used are deleted first, and none
that a running process uses: a process holds a shared lock on those that it reads.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from configs import s3
from configs.errors import FileError, UserError
from configs.files import sync, temporary
from configs.untrusted import require_inside

OWNER_ONLY = 0o700

Files = Mapping[str, tuple[int, str]]  # path in a copy's folder: bytes, and ETag or SHA-256
_kept_locks: dict[Path, IO[str]] = {}  # of the copies that this process may read until it ends


def root(kind: str) -> Path:
    """The folder in the cache for things of this `kind`, which is made. Only its owner can look into it."""
    cache = os.path.expanduser(os.environ.get("WORLDLOOM_CACHE") or "~/.cache/worldloom")
    if cache.startswith("~"):
        raise FileError(f"{cache}: this user has no home folder; set WORLDLOOM_CACHE to a folder with room")
    folder = Path(cache).absolute() / kind
    folder.mkdir(OWNER_ONLY, parents=True, exist_ok=True)
    with suppress(PermissionError):  # somebody else's
        folder.chmod(OWNER_ONLY)
    return folder


def run_folder(url: str) -> Path:
    """Where the run at the s3 `url` keeps on this machine what it appends to."""
    return root("runs") / require_inside(url.removeprefix("s3://").rstrip("/"), url)


def tmp_dir() -> AbstractContextManager[Path]:
    """An empty folder for files on their way from or to a bucket, deleted afterwards."""
    return temporary(root("tmp") / "files")


def local(url: str | Path, wanted: Callable[[str], bool] = bool) -> Path:
    """The file or folder `url` on this machine: itself, or a copy (of a folder, of the files whose path is `wanted`)
    that stays until this process ends. A FileNotFoundError if `url` is on a server and not there."""
    if not s3.is_s3(url):
        return Path(url)
    url = str(url).rstrip("/")
    name = _name_of(url)
    try:
        size, etag, _ = s3.head(url)
        files = {name: (size, etag)}
    except FileNotFoundError:
        tree = [(path, entry) for path, entry in s3.list_folder(url) if not path.endswith("/")]
        if not tree:
            raise
        files = {f"{name}/{path}": (entry.st_size, entry.etag) for path, entry in tree if wanted(path)}
    folder, lock = _copy(url, files)
    if _kept_locks.setdefault(folder, lock) is not lock:
        lock.close()
    return folder / name


@contextmanager
def cached_file(url: str | Path, size: int = 0, sha256: str | None = None) -> Iterator[Path]:
    """The file `url` on this machine: itself, or a copy that may be deleted when the block ends. Of a copy that has the
    given `size` and `sha256` the server is not asked; a UserError if what comes has another digest."""
    if not s3.is_s3(url):
        yield Path(url)
        return
    url, version = str(url), sha256
    if version is None:
        size, version, _ = s3.head(url)
    name = _name_of(url)
    folder, lock = _copy(url, {name: (size, version)})
    with lock:
        yield folder / name


def _name_of(url: str) -> str:
    return require_inside(url.rpartition("/")[2], url)


def _copy(url: str, files: Files) -> tuple[Path, IO[str]]:
    """The folder that holds `files`, fetched if they are not there, and the open lock that protects it."""
    key = json.dumps([url, sorted(files.items())])
    folder = root("copies") / hashlib.sha256(key.encode()).hexdigest()[:16]
    with ExitStack() as opened:
        lock = opened.enter_context(open(folder.with_suffix(".lock"), "a"))
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(lock.name)
        with open(folder.with_suffix(".fetch"), "a") as fetching:
            fcntl.flock(fetching, fcntl.LOCK_EX)  # waits for a process that fetches it
            sizes = {folder / path: size for path, (size, _) in files.items()}
            if not folder.is_dir() or any(not p.is_file() or p.stat().st_size != size for p, size in sizes.items()):
                _fetch(url, folder, files)
        opened.pop_all()  # the caller closes the lock
    return folder, lock


def _fetch(url: str, folder: Path, files: Files) -> None:
    """Copies `files`, which lie beside or below `url`, to `folder`, which appears with all of them."""
    for path in files:
        require_inside(path, url)  # whoever writes to a bucket chooses the keys
    _make_room(sum(size for size, _ in files.values()))
    with tmp_dir() as part:
        for path, (size, version) in files.items():
            copy, source = part / path, f"{url.rpartition('/')[0]}/{path}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            stat = s3.download(source, copy)
            if stat.st_size != size or version not in (stat.etag, stat.sha256):
                raise UserError(f"{source} is altered: it is not what its manifest says, or what was listed before")
            sync(copy)
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        part.rename(folder)


def _make_room(needed: int) -> None:
    """Deletes unused copies, the least recently used first, until `needed` more bytes are within the limit and fit on
    the disk, or there are no more."""
    copies, limit_gb = root("copies"), os.environ.get("WORLDLOOM_CACHE_GB", "50")
    try:
        limit = int(float(limit_gb) * 1e9)
    except (ValueError, OverflowError) as error:
        raise UserError(f"WORLDLOOM_CACHE_GB={limit_gb} is no number of gigabytes") from error
    sizes: dict[Path, int] = {}
    for lock in sorted(copies.glob("*.lock"), key=lambda lock: lock.stat().st_mtime):
        with suppress(FileNotFoundError):  # another process deletes it
            sizes[lock] = sum(path.stat().st_size for path in lock.with_suffix("").rglob("*"))
    excess = max(sum(sizes.values()) + needed - limit, needed - shutil.disk_usage(copies).free)
    for lock, size in sizes.items():
        if excess <= 0:
            return
        with open(lock, "a") as file, suppress(BlockingIOError):  # a process uses it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            excess -= size
