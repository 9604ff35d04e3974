"""The one place that opens a url: a local path, or `s3://bucket/key` (`configs/s3.py` asks the server)."""

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

from configs import cache, s3
from configs.errors import FileError, UserError
from configs.files import atomic_files, atomic_path, create_file, utf8
from configs.files import write_text as write_local_text
from configs.remote_path import S3Path
from configs.s3_errors import bucket_and_key

BUFFER_BYTES = 4 << 20  # of a file that is read piece by piece from a server
WHOLE_BYTES = s3.PART_BYTES  # of one that is read from its beginning to its end


def is_s3(url: str | Path) -> bool:
    """Whether `url` is on a server; a Path is always local, but for one that was a url with its slashes swallowed."""
    return str(url).startswith("s3:/")


def join(folder: str | Path, name: str) -> str:
    """The url of `name` in `folder`."""
    return f"{str(folder).rstrip('/')}/{name}" if str(folder) != "/" else f"/{name}"


def parent(url: str | Path) -> str:
    """The url of the folder that `url` lies in."""
    folder, slash, _ = str(url).rpartition("/")
    return folder if slash else "."


def name_of(url: str | Path) -> str:
    """The last part of `url`."""
    return str(url).rstrip("/").rpartition("/")[2]


def path(url: str | Path) -> Path:
    """`url` as a path for reading: its names, whether it is there, what is in it and its bytes can be asked for."""
    return cast(Path, S3Path(url)) if is_s3(url) else Path(url)


def read_bytes(url: str | Path) -> bytes:
    """The whole of `url`. Raises FileNotFoundError if it is not there."""
    return s3.read(str(url)) if is_s3(url) else Path(url).read_bytes()


def read_range(url: str | Path, offset: int, length: int) -> bytes:
    """`length` bytes of `url` from `offset` on. Raises ValueError if it ends before."""
    if is_s3(url):
        found = s3.read(str(url), offset, length)
    else:
        with open(url, "rb", buffering=0) as file:
            found = os.pread(file.fileno(), length, offset)
    if len(found) != length:
        raise UserError(f"{url} is truncated: {len(found)} of {length} bytes at {offset}; fetch or encode it again")
    return found


def opened(url: str | Path, buffer_bytes: int = BUFFER_BYTES) -> io.BufferedReader:
    """A file for reading, to be closed. From a server come just the bytes that are asked for, `buffer_bytes` of them or
    more at a time: 1 for somebody who knows what he wants."""
    return io.BufferedReader(s3.RemoteFile(str(url)), buffer_bytes) if is_s3(url) else open(url, "rb")


def local(url: str | Path, wanted: Callable[[str], bool] = bool) -> Path:
    """The file or folder `url` as one on this machine: itself, or a copy, of a folder that of the files whose path in
    it is `wanted`. Raises FileNotFoundError if `url` is on a server and not there."""
    return cache.local_copy(str(url), wanted) if is_s3(url) else Path(url)


@contextmanager
def borrowed(url: str | Path) -> Iterator[Path]:
    """The file `url` as one on this machine within the block: itself, or a copy that may be deleted afterwards."""
    if not is_s3(url):
        yield Path(url)
        return
    with cache.borrowed(str(url)) as copy:
        yield copy


def copy_of(url: str, size: int, sha256: str) -> AbstractContextManager[Path]:
    """A copy on this machine of the file `url` on a server, whose bytes are known; see `cache.copy_of`."""
    return cache.copy_of(url, size, sha256)


def size(url: str | Path) -> int:
    """Bytes of `url`. Raises FileNotFoundError if it is not there."""
    return s3.head(str(url)).bytes if is_s3(url) else Path(url).stat().st_size


def version(url: str | Path) -> Hashable:
    """What is another one once `url` is written anew. Raises FileNotFoundError if it is not there."""
    if is_s3(url):
        return s3.head(str(url)).etag
    found = Path(url).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def sha256(url: str | Path) -> str:
    """The SHA-256 of the bytes at `url` as hex digits; all of them are read."""
    with opened(url, WHOLE_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exists(url: str | Path) -> bool:
    """Whether there is a file at `url`. Raises FileNotFoundError if not even the bucket is there."""
    return path(url).is_file()


def list_files(folder: str | Path) -> list[str]:
    """The urls of the files directly in `folder`, sorted; none if there is no such folder."""
    if not is_s3(folder):
        found = Path(folder).iterdir() if Path(folder).is_dir() else ()
        return sorted(join(folder, path.name) for path in found if path.is_file())
    return sorted(url for url in _listed(folder) if not url.endswith("/"))


def files_at(url: str | Path) -> list[str]:
    """`url`, or if it is a folder of this machine the files directly in it."""
    return list_files(url) if not is_s3(url) and Path(url).is_dir() else [str(url)]


def list_folders(folder: str | Path) -> list[str]:
    """The urls of the folders directly in `folder`, sorted; none if there is no such folder."""
    if not is_s3(folder):
        found = Path(folder).iterdir() if Path(folder).is_dir() else ()
        return sorted(join(folder, path.name) for path in found if path.is_dir())
    return sorted(url.rstrip("/") for url in _listed(folder) if url.endswith("/"))


def _listed(folder: str | Path) -> Iterator[str]:
    bucket, prefix = bucket_and_key(join(folder, ""))
    found = s3.list_objects(join(folder, ""), "/")
    return (f"s3://{bucket}/{one.key}" for one in found if one.key != prefix)  # not what stands for the folder itself


def list_tree(folder: str | Path) -> dict[str, int]:
    """Bytes of every file in `folder` and the folders in it, by the path from `folder`; sorted."""
    if is_s3(folder):
        _, prefix = bucket_and_key(join(folder, ""))
        files = (one for one in s3.list_objects(join(folder, "")) if not one.key.endswith("/"))
        found = {one.key.removeprefix(prefix): one.bytes for one in files}
    else:
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        found = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    return dict(sorted(found.items()))


@contextmanager
def writing(url: str | Path) -> Iterator[Path]:
    """A local path to write to; what lies there when the block ends well appears at `url`, whole."""
    if not is_s3(url):
        with atomic_path(url) as part:
            yield part
        return
    bucket_and_key(str(url))  # a fault of the url, before the work
    name = cache.local_name(str(url))
    with cache.scratch() as folder:
        yield folder / name
        write_file(folder / name, url)


@contextmanager
def writing_folder(url: str | Path, last: str, new: bool = False) -> Iterator[Path]:
    """An empty local folder to write files into, which appear in the folder `url` when the block ends well; the one
    called `last` does so after all others, so that its presence means that all are there. If `url` is to be `new`, it
    must not hold any then."""
    if not is_s3(url):
        with atomic_files(url, last, new) as folder:
            yield folder
        return
    exists(join(url, last))  # which raises if there is no such bucket, before the work
    with cache.scratch() as folder:
        yield folder
        remove(join(url, last))  # of what was there before
        written: dict[str, Hashable] = {}
        for name in sorted(list_tree(folder), key=lambda name: (name == last, name)):
            write_file(folder / name, join(url, name))
            written[name] = version(join(url, name))
        require_sole_writer(url, written, last)


def require_sole_writer(url: str | Path, written: Mapping[str, Hashable], last: str) -> None:
    """Raises OSError in one line if another process wrote to some of the files meanwhile: of a mixture, the file `last`
    is not there. A server has no lock; whoever finds the other's file takes its own `last` back."""
    there = {name: version(join(url, name)) for name in written if exists(join(url, name))}
    if there != written:
        if there.get(last) == written[last]:
            remove(join(url, last))
        raise FileError(f"{url} was written to by another process at the same time; run this again, alone")


def write_file(file: Path, url: str | Path) -> None:
    """Copies the file `file` of this machine to `url`, where it appears whole or not at all."""
    if is_s3(url):
        s3.upload(file, str(url))
        return
    with atomic_path(url) as part:
        shutil.copyfile(file, part)


def write_text(url: str | Path, text: str) -> None:
    """Writes `text` to `url` as UTF-8, whole or not at all."""
    if is_s3(url):
        s3.put(str(url), utf8(text, url))
    else:
        write_local_text(url, text)


def create(url: str | Path, data: bytes) -> bool:
    """Writes `data` to `url` unless something is there, and says whether it did: of all who try, one is first.

    `data` must tell this writer from all others. Raises OSError in one line if the server cannot do that.
    """
    return s3.create(str(url), data) if is_s3(url) else create_file(url, data)


def remove(url: str | Path) -> None:
    """Deletes the file at `url`, if there is one."""
    if is_s3(url):
        s3.remove(str(url))
    else:
        Path(url).unlink(missing_ok=True)


def remove_folder(folder: str | Path, first: str = "") -> None:
    """Deletes `folder` and everything in it, the file `first` before all others: a kill in the middle leaves nothing
    that looks whole. Of a link to a folder, the link alone goes."""
    if not is_s3(folder) and Path(folder).is_symlink():
        Path(folder).unlink()
        return
    if first:
        remove(join(folder, first))
    if is_s3(folder):
        bucket, _ = bucket_and_key(join(folder, ""))
        with ThreadPoolExecutor(s3.PARALLEL) as pool:
            list(pool.map(lambda one: remove(f"s3://{bucket}/{one.key}"), list(s3.list_objects(join(folder, "")))))
    elif Path(folder).is_dir():
        shutil.rmtree(folder)


def remove_unfinished(folder: str | Path, older_s: float = 0.0) -> None:
    """Deletes what killed writers left in `folder`: temporary files, or uploads that never came to their end.

    Only what is older than `older_s`: with 0, somebody else who is writing there now gets an OSError.
    """
    if is_s3(folder):
        s3.abort_uploads(join(folder, ""), older_s)
        return
    for left in Path(folder).glob(".*.tmp*") if Path(folder).is_dir() else ():
        if left.is_file() and time.time() - left.stat().st_mtime >= older_s:
            left.unlink(missing_ok=True)
