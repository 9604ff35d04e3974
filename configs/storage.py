"""The one place that opens urls: local paths, and `s3://bucket/key` (`configs/s3.py` asks the server)."""

import hashlib
import io
import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import cast

from configs import cache, files, s3
from configs.errors import FileError, UserError
from configs.s3_errors import bucket_and_key
from configs.s3_path import S3Path

BUFFER_BYTES = 4 << 20  # of a file on a server that is read piece by piece
WHOLE_BYTES = s3.PART_BYTES  # of one that is read from its beginning to its end


def is_s3(url: str | Path) -> bool:
    """Whether `url` is on a server; a Path too, which turns the two slashes of a url into one."""
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
    if not is_s3(url):
        return Path(url)
    if isinstance(url, str):
        bucket_and_key(join(url, ""))
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
    return cast(io.BufferedReader, path(url).open("rb", buffer_bytes if is_s3(url) else -1))


def local(url: str | Path, wanted: Callable[[str], bool] = bool) -> Path:
    """The file or folder `url` on this machine: itself, or a copy, of a folder that of the files whose path in it is
    `wanted`. A FileNotFoundError if `url` is on a server and not there."""
    return cache.local_copy(str(url), wanted) if is_s3(url) else Path(url)


def cached_file(url: str | Path, size: int = 0, sha256: str | None = None) -> AbstractContextManager[Path]:
    """The file `url` on this machine: itself, or a copy that may be deleted when the block ends. Of a copy that has the
    given `size` and `sha256` the server is not asked."""
    return cache.cached_file(str(url), size, sha256) if is_s3(url) else nullcontext(Path(url))


def size(url: str | Path) -> int:
    """Bytes of `url`."""
    return path(url).stat().st_size


def version(url: str | Path) -> Hashable:
    """What changes when `url` is written again."""
    found = path(url).stat()
    return found.etag if isinstance(found, s3.Found) else (found.st_ino, found.st_size, found.st_mtime_ns)


def sha256(url: str | Path) -> str:
    """The SHA-256 of the bytes at `url` as hex digits; all of them are read."""
    with open(url, WHOLE_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exists(url: str | Path) -> bool:
    """Whether there is a file at `url`. A FileNotFoundError if not even the bucket is there."""
    return path(url).is_file()


def list_files(folder: str | Path) -> list[str]:
    """The urls of the files directly in `folder`, sorted; none if there is no such folder."""
    return sorted(join(folder, name) for name in _names(folder) if not name.endswith("/"))


def list_folders(folder: str | Path) -> list[str]:
    """The urls of the folders directly in `folder`, sorted; none if there is no such folder."""
    return sorted(join(folder, name.rstrip("/")) for name in _names(folder) if name.endswith("/"))


def _names(folder: str | Path) -> Iterator[str]:
    """Of what is directly in `folder`; those of folders end in `/`."""
    if is_s3(folder):
        yield from s3.list_folder(str(folder), "/")
    elif Path(folder).is_dir():
        for found in Path(folder).iterdir():
            if found.is_dir() or found.is_file():
                yield f"{found.name}/" if found.is_dir() else found.name


def files_at(url: str | Path) -> list[str]:
    """`url`, or if it is a folder of this machine the files directly in it."""
    return list_files(url) if not is_s3(url) and Path(url).is_dir() else [str(url)]


def list_tree(folder: str | Path) -> dict[str, int]:
    """Bytes of every file in `folder` and the folders in it, by the path from `folder`; sorted."""
    if is_s3(folder):
        listed = s3.list_folder(str(folder)).items()
        found = {name: entry.st_size for name, entry in listed if not name.endswith("/")}  # that stand for folders
    else:
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        found = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    return dict(sorted(found.items()))


@contextmanager
def writing(url: str | Path) -> Iterator[Path]:
    """A local path to write to; what lies there when the block ends well appears at `url`, whole."""
    if not is_s3(url):
        with files.atomic_path(url) as part:
            yield part
        return
    bucket_and_key(str(url))  # an error before the work
    with cache.tmp_dir() as folder:
        yield folder / name_of(url)
        write_file(folder / name_of(url), url)


@contextmanager
def writing_folder(url: str | Path, last: str, new: bool = False) -> Iterator[Path]:
    """An empty local folder for files that appear in the folder `url` when the block ends well; the file `last` comes
    after all others, so that it is there only if they are. A `new` folder must not hold any files then."""
    if not is_s3(url):
        with files.atomic_files(url, last, new) as folder:
            yield folder
        return
    exists(join(url, last))  # raises if there is no such bucket, before the work
    with cache.tmp_dir() as folder:
        yield folder
        remove(join(url, last))  # of what was there before
        written: dict[str, Hashable] = {}
        for name in sorted(list_tree(folder), key=lambda name: (name == last, name)):
            write_file(folder / name, join(url, name))
            written[name] = version(join(url, name))
        require_sole_writer(url, written, last)


def require_sole_writer(url: str | Path, written: Mapping[str, Hashable], last: str) -> None:
    """Raises FileError if another process wrote to some of the files meanwhile, and leaves no mixture with `last`.

    A server has no lock: a writer that finds the other's file takes its own `last` back.
    """
    there = {name: version(join(url, name)) for name in written if exists(join(url, name))}
    if there != written:
        if there.get(last) == written[last]:
            remove(join(url, last))
        raise FileError(f"{url} was written to by another process at the same time; run this again, alone")


def write_file(file: Path, url: str | Path) -> None:
    """Copies the local `file` to `url`, where it appears whole or not at all."""
    if is_s3(url):
        with file.open("rb") as data:
            s3.upload(data, str(url))
        return
    with files.atomic_path(url) as part:
        shutil.copyfile(file, part)


def write_text(url: str | Path, text: str) -> None:
    """Writes `text` to `url` as UTF-8, whole or not at all."""
    if is_s3(url):
        s3.upload(io.BytesIO(files.utf8(text, url)), str(url))
    else:
        files.write_text(url, text)


def create(url: str | Path, data: bytes) -> bool:
    """Writes `data` to `url` unless something is there, and says whether it did.

    `data` must differ from that of all other writers. Raises NotOffered if the server cannot do that.
    """
    return s3.create(str(url), data) if is_s3(url) else files.create_file(url, data)


def remove(url: str | Path) -> None:
    """Deletes the file at `url`, if there is one."""
    if is_s3(url):
        s3.remove(*bucket_and_key(str(url)))
    else:
        Path(url).unlink(missing_ok=True)


def remove_folder(folder: str | Path, first: str = "") -> None:
    """Deletes `folder` and everything in it, the file `first` before all others: a kill in the middle leaves nothing
    that looks whole. Of a link to a folder, only the link is deleted."""
    if not is_s3(folder) and Path(folder).is_symlink():
        Path(folder).unlink()
        return
    if first:
        remove(join(folder, first))
    if is_s3(folder):
        bucket, _ = bucket_and_key(join(folder, ""))
        with ThreadPoolExecutor(s3.PARALLEL) as pool:
            list(pool.map(lambda entry: s3.remove(bucket, entry[0]), list(s3.list_objects(join(folder, "")))))
    elif Path(folder).is_dir():
        shutil.rmtree(folder)


def remove_unfinished(folder: str | Path) -> None:
    """Deletes temporary files and unfinished uploads in `folder`. A process that is writing there gets an OSError."""
    if is_s3(folder):
        s3.abort_uploads(join(folder, ""), 0.0)
        return
    for left in Path(folder).glob(".*.tmp*"):
        if left.is_file():
            left.unlink(missing_ok=True)
