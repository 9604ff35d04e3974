"""Files appear whole or not at all."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


Read = Mapping[str, str | Path | Sequence[str | Path] | None]  # places by the word that names them


def require_other_files(outs: Iterable[str | Path], read: Read, word: str = "out") -> None:
    """Raises ValueError in one line if one of `outs`, which a command is about to write, is a file that it reads, under
    whatever name or link, or lies in a folder that it reads. `word` is the setting that names them.

    To be called before anything is written. Of a folder of which only some files matter, name those.
    """
    places = [
        (label, one)
        for label, given in read.items()
        for one in ([given] if isinstance(given, str | Path) else given or ())
    ]
    for out in outs:
        for label, place in places:
            if _is_or_lies_in(str(out), str(place)):
                how = "over" if _same_file(str(out), str(place)) else "into"
                raise ValueError(
                    f"{out} would be written {how} {label}={place}, which this reads; give another {word}="
                )


def _is_or_lies_in(out: str, place: str) -> bool:
    if out.startswith("s3:") or place.startswith("s3:"):
        return f"{out.rstrip('/')}/".startswith(f"{place.rstrip('/')}/")
    here = Path(os.path.realpath(os.path.dirname(os.path.abspath(out)))) / os.path.basename(out)  # itself, if a link
    real = Path(os.path.realpath(out))
    return any(_same_file(above, place) for above in {here, *here.parents, real, *real.parents})


def _same_file(one: str | Path, other: str | Path) -> bool:
    """Whether both are one, hard links included; of what is not there yet, whether both would be."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def yaml_files(words: Sequence[str]) -> list[str]:
    """The files of settings among a command's words."""
    return [word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]


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
