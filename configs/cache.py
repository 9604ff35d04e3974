"""What of a bucket lies on this machine for a while: copies that are read, and files on their way up.

All of it is in one folder, `$WORLDLOOM_CACHE` (`~/.cache/worldloom` if that is not set). Copies are kept from run to
run up to `$WORLDLOOM_CACHE_GB` (50), the longest unused going first; those that a living process reads stay.
"""

import atexit
import fcntl
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from configs import s3
from configs.errors import FileError, UserError
from configs.files import NO_ROOM, sha256_file, sync
from configs.foreign import require_inside
from configs.remote_path import require_files
from configs.s3_errors import Damaged, MissingBucket, bucket_and_key

DEFAULT_GB = 50.0
OWNER_ONLY = 0o700  # of a folder
TRIES = 1000  # to have a spoilt copy for oneself: about a minute

_held: dict[Path, IO[str]] = {}  # locks of the copies that this process reads, until it ends


def root() -> Path:
    """The folder of everything here, made if it is not there."""
    told = os.path.expanduser(os.environ.get("WORLDLOOM_CACHE") or "~/.cache/worldloom")
    if told.startswith("~"):
        raise FileError(f"{told}: this user has no home folder; set WORLDLOOM_CACHE to a folder with room")
    folder = Path(told).absolute()
    try:
        folder.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot write to {folder}: {error.strerror}; set WORLDLOOM_CACHE to a folder with room"
        ) from error
    return folder


def _owners(folder: Path) -> Path:
    """The folder, made; nobody else on the machine can look into it: what a bucket shows to few stays with them."""
    folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
    if folder.stat().st_mode & ~OWNER_ONLY & 0o777:  # made by an earlier version
        with suppress(PermissionError):  # somebody else's
            folder.chmod(OWNER_ONLY)
    return folder


def run_folder(url: str) -> Path:
    """Where the run at the s3 `url` keeps on this machine what it appends to."""
    return _owners(root() / "runs") / require_inside(url.removeprefix("s3://").rstrip("/"), url)


def local_name(url: str) -> str:
    """What the file or folder at the s3 `url` is called on this machine. Raises ValueError if nothing can be."""
    return require_inside(url.rpartition("/")[2], url)


def limit_bytes() -> int:
    """How much the copies may take."""
    told = os.environ.get("WORLDLOOM_CACHE_GB", str(DEFAULT_GB))
    try:
        return int(float(told) * 1e9)
    except (ValueError, OverflowError) as error:
        raise UserError(f"WORLDLOOM_CACHE_GB={told} is no number of gigabytes") from error


def local_copy(url: str, wanted: Callable[[str], bool] = bool) -> Path:
    """The file, or the folder with everything in it, that lies at the s3 `url`, on this machine; of a folder only the
    files whose path in it is `wanted`.

    It is as it was at the time of the call: what has changed in the bucket is fetched again. Several processes share
    one copy, and it stays until this one ends. Raises FileNotFoundError if nothing is there.
    """
    url = url.rstrip("/")
    name, found = local_name(url), _find(url)
    below = {place: it for place, it in found.items() if not place or wanted(place[1:])}
    require_files(url, [place[1:] for place in below if place])
    told = json.dumps([url, sorted(below.items())])
    folder = root() / "copies" / hashlib.sha256(told.encode()).hexdigest()[:16]
    sizes = {f"{name}{place}": size for place, (size, _) in below.items()}
    if folder in _held and not _is_whole(folder, sizes):
        _held.pop(folder).close()  # else this process would wait for itself
    if folder not in _held:

        def fetch(part: Path) -> None:
            for place in below:
                path = part / f"{name}{place}"
                path.parent.mkdir(parents=True, exist_ok=True)
                s3.download(url + place, path)

        lock = _open_lock(folder)
        _fill(url, folder, lock, sizes, fetch)
        _held[folder] = lock
    return folder / name


@contextmanager
def borrowed(url: str) -> Iterator[Path]:
    """The file that lies at the s3 `url`, on this machine within the block."""
    found = s3.head(url)
    with _copied(url, found.sha256 or found.etag, found.bytes, lambda copy: None) as copy:
        yield copy


@contextmanager
def copy_of(url: str, size: int, sha256: str) -> Iterator[Path]:
    """As `borrowed`, of a file of which size and SHA-256 are known: nothing is asked of the server where the copy is
    there already. Raises Damaged for other bytes."""

    def compare(copy: Path) -> None:
        if sha256_file(copy) != sha256:
            raise Damaged(url, "altered: its SHA-256 is not the manifest's")

    with _copied(url, sha256, size, compare) as copy:
        yield copy


@contextmanager
def _copied(url: str, version: str, size: int, check: Callable[[Path], None]) -> Iterator[Path]:
    folder = root() / "copies" / hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:16]
    name = local_name(url)

    def fetch(part: Path) -> None:
        s3.download(url, part / name)
        check(part / name)

    with _open_lock(folder) as lock:
        _fill(url, folder, lock, {name: size}, fetch)
        yield folder / name


def _fill(url: str, folder: Path, lock: IO[str], sizes: Mapping[str, int], fetch: Callable[[Path], None]) -> None:
    """Leaves `folder` with the files that `fetch` puts there, of these `sizes`, unless all are there already, and
    `lock` held: as long as it is, the folder stays. Of several processes that want it, one fetches."""
    for _ in range(TRIES):
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits while another one fetches
        if _is_whole(folder, sizes):
            os.utime(lock.fileno())
            return
        try:  # without waiting: whoever has fetched it since then keeps its lock as long as it lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(random.uniform(0.01, 0.1))
            continue
        if not _is_whole(folder, sizes):
            shutil.rmtree(folder, ignore_errors=True)  # spoilt: by who cleans disks, or a machine that lost its power
            with _room_for(url, sum(sizes.values())), _filling(folder, lock, sum(sizes.values())) as part:
                fetch(part)
                if not _is_whole(part, sizes):
                    raise FileError(f"{url} was changed while it was copied; run the command again")
    raise FileError(
        f"{folder}, the copy of {url}, is damaged, and another process holds it; end that one, or set WORLDLOOM_CACHE "
        "to another folder"
    )


def _is_whole(folder: Path, sizes: Mapping[str, int]) -> bool:
    try:
        return folder.is_dir() and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return False


@contextmanager
def _room_for(url: str, size: int) -> Iterator[None]:
    """Says what was too large for which disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise FileError(
            f"no room in {root()} for a copy of {url} ({size} bytes): {error.strerror}; set WORLDLOOM_CACHE to a "
            "folder with room, or make some"
        ) from error


@contextmanager
def _filling(folder: Path, lock: IO[str], needed: int) -> Iterator[Path]:
    """An empty folder for `needed` bytes that gets the name `folder` when the block ends well, and is deleted when it
    does not."""
    part = folder.with_suffix(".part")
    try:
        _reserve(part, lock, needed)
        yield part
        for path in part.rglob("*"):
            path.chmod(0o600 if path.is_file() else OWNER_ONLY)
            if path.is_file():
                sync(path)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _find(url: str) -> dict[str, tuple[int, str]]:
    """Size and ETag of the object `url`, or of all in the folder `url`, by what follows `url` in their names."""
    try:
        found = s3.head(url)
        return {"": (found.bytes, found.etag)}
    except MissingBucket:
        raise
    except FileNotFoundError:
        prefix = bucket_and_key(f"{url}/")[1]
        files = (it for it in s3.list_objects(f"{url}/") if not it.key.endswith("/"))  # not what stands for a folder
        below = {f"/{it.key.removeprefix(prefix)}": (it.bytes, it.etag) for it in files}
        if not below:
            raise
        return below


def _open_lock(folder: Path) -> IO[str]:
    _owners(folder.parent)
    return open(folder.with_suffix(".lock"), "a", encoding="utf-8", opener=_owner_only)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _reserve(part: Path, lock: IO[str], needed: int) -> None:
    """Makes the folder `part` and room for `needed` bytes in it, which others count as taken from then on."""
    with open(root() / "copies" / ".lock", "a", opener=_owner_only) as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        _make_room(needed)
        lock.truncate(0)
        lock.write(str(needed))
        lock.flush()
        part.mkdir(mode=OWNER_ONLY)


def _make_room(needed: int) -> None:
    """Deletes copies that nobody reads, the longest unused first, until `needed` more bytes are within the limit and
    what the disk has free, or there are no more of them: what running processes need comes before the limit."""
    promised = _promised()
    unwritten = sum(max(0, size - _bytes_of(folder.with_suffix(".part"))) for folder, size in promised.items())
    copies = [lock.with_suffix("") for lock in (root() / "copies").glob("?*.lock")]
    whole = {folder: _bytes_of(folder) for folder in copies if folder.is_dir()}
    taken = sum({**promised, **whole}.values())  # one that has become whole meanwhile counts once
    over = max(taken + needed - limit_bytes(), unwritten + needed - shutil.disk_usage(root()).free)
    for folder in sorted(whole, key=lambda folder: folder.with_suffix(".lock").stat().st_mtime):
        if over <= 0:
            return
        with _open_lock(folder) as lock, suppress(BlockingIOError):  # somebody reads it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.rename(folder.with_suffix(".part"))  # killed in the middle, it is no copy any more
            shutil.rmtree(folder.with_suffix(".part"))
            over -= whole[folder]


def _promised() -> dict[Path, int]:
    """Copies that are being filled, and how many bytes each will have; what killed processes left is deleted."""
    promised = {}
    for part in (root() / "copies").glob("*.part"):
        with _open_lock(part) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part)
            except BlockingIOError:  # somebody fills it
                promised[part.with_suffix("")] = int(part.with_suffix(".lock").read_text() or 0)
    return promised


def _bytes_of(folder: Path) -> int:
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # renamed just now, by who fills the folder
                found += os.stat(os.path.join(place, name)).st_size
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder for a file on its way up; it is gone afterwards, or at the next use if this process is killed."""
    with tempfile.TemporaryDirectory(dir=_scratch_of(os.getpid())) as folder:
        yield Path(folder)


@lru_cache(maxsize=1)
def _scratch_of(pid: int) -> Path:
    """This process's own folder; those of processes that were killed are deleted: nobody holds their locks."""
    every = _owners(root() / "scratch")
    with open(every / ".lock", "a", opener=_owner_only) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in every.glob("*/"):
            with open(other / ".lock", "a") as held:
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(other)
        own = Path(tempfile.mkdtemp(prefix=f"{pid}.", dir=every))
        held = open(own / ".lock", "a", opener=_owner_only)  # noqa: SIM115  # until the process ends
        fcntl.flock(held, fcntl.LOCK_EX)
    atexit.register(_forget, own, pid, held)
    return own


def _forget(folder: Path, pid: int, held: IO[str]) -> None:
    if os.getpid() == pid:  # not in a fork of the process that made it
        with suppress(FileNotFoundError), open(folder.parent / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # or a process that looks for killed ones would find half of it
            shutil.rmtree(folder, ignore_errors=True)
        held.close()
