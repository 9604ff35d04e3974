"""The one place that opens urls: local paths, and `s3://bucket/key` (`configs/s3.py` asks the server)."""

import builtins
import hashlib
import io
import shutil
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast

from configs import cache, files, s3
from configs.errors import FileError, UserError
from configs.untrusted import require_inside

BUFFER_BYTES = 4 << 20  # of a file on a server that is read piece by piece
WHOLE_BYTES = s3.PART_BYTES  # of one that is read from its beginning to its end
is_s3, local, cached_file = s3.is_s3, cache.local, cache.cached_file


class RemoteFile(io.RawIOBase):
    """An object as a file for reading, each read a request for just those bytes."""

    def __init__(self, url: str) -> None:
        self.url, self.name, self.position = url, url, 0

    @cached_property
    def size(self) -> int:
        return s3.head(self.url).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = self.size if whence == io.SEEK_END else self.position if whence == io.SEEK_CUR else 0
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")
        data = s3.read(self.url, self.position, len(memory))
        memory[: len(data)] = data
        self.position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = s3.read(self.url, self.position)  # io's own asks for 8 kB at a time
        self.position += len(data)
        return data


class S3Path(PurePosixPath):
    """`s3://bucket/key` with what readers ask of a Path; its parts, names and suffixes are a path's own."""

    def __str__(self) -> str:
        return "s3://" + "/".join(self.parts[1:])

    def stat(self) -> s3.Found:
        return s3.head(str(self))

    def is_file(self) -> bool:
        """Whether there is an object. A FileError if not even the bucket is there."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return next(s3.list_folder(str(self)), None) is not None

    def iterdir(self) -> Iterator["S3Path"]:
        """The files and folders directly in it. A UserError for a key that no path can have, such as `a//b`."""
        return (self / require_inside(name.removesuffix("/"), str(self)) for name, _ in s3.list_folder(str(self), "/"))

    def open(self, mode: str = "rb", buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
        """Only the bytes that are asked for are fetched, `buffering` of them or more at a time."""
        assert mode == "rb"
        return io.BufferedReader(RemoteFile(str(self)), max(1, buffering))

    def read_bytes(self) -> bytes:
        return s3.read(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)


def join(folder: str | Path, name: str) -> str:
    """The url of `name` in `folder`."""
    return f"{str(folder).rstrip('/')}/{name}"


def parent(url: str | Path) -> str:
    """The url of the folder that `url` lies in."""
    folder, slash, _ = str(url).rpartition("/")
    return folder if slash else "."


def name_of(url: str | Path) -> str:
    """The last part of `url`."""
    return str(url).rstrip("/").rpartition("/")[2]


def path(url: str | Path) -> Path:
    """`url` as a path for reading: its names, whether it is there, what is in it and its bytes can be asked for."""
    if not is_s3(url):
        return Path(url)
    if isinstance(url, str):
        s3.bucket_and_key(join(url, ""))
    return cast(Path, S3Path(url))


def read_bytes(url: str | Path) -> bytes:
    """The whole of `url`."""
    return path(url).read_bytes()


def read_range(url: str | Path, offset: int, length: int) -> bytes:
    """`length` bytes of `url` from `offset` on. A UserError if it ends before."""
    with open(url, 1) as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise UserError(f"{url} is truncated: {len(data)} of {length} bytes at {offset}; fetch or encode it again")
    return data


def open(url: str | Path, buffer_bytes: int = BUFFER_BYTES) -> io.BufferedReader:
    """A file for reading. From a server come only the bytes that are asked for, at least `buffer_bytes` at a time."""
    if not is_s3(url):
        return builtins.open(url, "rb")
    return cast(io.BufferedReader, path(url).open("rb", buffer_bytes))


def version(url: str | Path) -> Hashable:
    """What changes when `url` is written again."""
    stat = path(url).stat()
    return stat.etag if isinstance(stat, s3.Found) else (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def sha256(url: str | Path) -> str:
    """The SHA-256 of the bytes at `url` as hex digits; all of them are read."""
    with open(url, WHOLE_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exists(url: str | Path) -> bool:
    """Whether there is a file at `url`. A FileError if not even the bucket is there."""
    return path(url).is_file()


def list_folder(folder: str | Path) -> list[str]:
    """The names of what is directly in `folder`, sorted, those of folders with a `/` at their end; none if there is no
    such folder."""
    if is_s3(folder):
        return sorted(name for name, _ in s3.list_folder(str(folder), "/"))
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in paths if path.is_dir() or path.is_file())


def files_at(url: str | Path) -> list[str]:
    """`url`, or if it is a folder of this machine the files directly in it."""
    if is_s3(url) or not Path(url).is_dir():
        return [str(url)]
    return [join(url, name) for name in list_folder(url) if not name.endswith("/")]


def list_tree(folder: str | Path) -> dict[str, int]:
    """Bytes of every file in `folder` and the folders in it, by the path from `folder`; sorted."""
    if is_s3(folder):
        listed = s3.list_folder(str(folder))
        sizes = [(name, found.st_size) for name, found in listed if not name.endswith("/")]  # that stand for folders
    else:
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        sizes = [(str(path.relative_to(folder)), path.stat().st_size) for path in paths]
    return dict(sorted(sizes))


@contextmanager
def writing(url: str | Path) -> Iterator[Path]:
    """A local path to write to; what lies there when the block ends well appears at `url`, whole."""
    if not is_s3(url):
        with files.atomic_path(url) as part:
            yield part
        return
    s3.bucket_and_key(str(url))  # an error before the work
    with cache.tmp_dir() as folder:
        yield folder / name_of(url)
        s3.upload(folder / name_of(url), str(url))


@contextmanager
def writing_folder(url: str | Path, last: str, new: bool = False) -> Iterator[Path]:
    """An empty local folder for files that appear in the folder `url` when the block ends well; the file `last` comes
    after all others, so that it is there only if they are. In a `new` folder nothing may be before.

    A bucket has no lock: of several writers at the same time, those that find another's file raise FileError.
    """
    if not is_s3(url):
        with files.atomic_folder(url, last, new) as folder:
            yield folder
        return
    exists(join(url, last))  # raises if there is no such bucket, before the work
    with cache.tmp_dir() as folder:
        yield folder
        remove(join(url, last))  # of what was there before
        names = sorted(list_tree(folder), key=lambda name: (name == last, name))
        written = {name: s3.upload(folder / name, join(url, name)).etag for name in names}
        require_sole_writer(url, written, last)


def require_sole_writer(url: str | Path, written: Mapping[str, Hashable], last: str) -> None:
    """Raises FileError if some of the files that were `written` are another process's now. Takes `last` back unless it
    is the other's: no mixture looks whole."""
    there = {name: version(join(url, name)) for name in written if exists(join(url, name))}
    if there != written:
        if there.get(last) == written[last]:
            remove(join(url, last))
        raise FileError(f"{url} was written to by another process at the same time; run this again, alone")


def write_text(url: str | Path, text: str) -> None:
    """Writes `text` to `url` as UTF-8, whole or not at all; names of files in it keep their bytes."""
    with writing(url) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def create(url: str | Path, data: bytes) -> bool:
    """Writes `data` to `url` unless something is there, and says whether it did. `data` must differ from that of all
    other writers. A server without conditional writes overwrites."""
    return s3.create(str(url), data) if is_s3(url) else files.create_file(url, data)


def remove(url: str | Path) -> None:
    """Deletes the file at `url`, if there is one."""
    if is_s3(url):
        s3.remove(*s3.bucket_and_key(str(url)))
    else:
        Path(url).unlink(missing_ok=True)


def remove_folder(folder: str | Path, first: str) -> None:
    """Deletes `folder` and everything in it, the file `first` before all others: a kill in the middle leaves nothing
    that looks whole. Of a link to a folder, only the link is deleted."""
    if is_s3(folder):
        bucket, prefix = s3.bucket_and_key(join(folder, ""))
        keys = [prefix + name for name, _ in s3.list_folder(str(folder))]
        remove(join(folder, first))
        with ThreadPoolExecutor(s3.PARALLEL) as pool:
            list(pool.map(lambda key: s3.remove(bucket, key), [*keys, prefix]))
    elif Path(folder).is_symlink():
        remove(folder)
    else:
        remove(join(folder, first))
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
