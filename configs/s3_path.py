"""An s3:// url that is read like a Path: readers of recordings need not know where their files lie."""

import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from configs import s3
from configs.foreign import require_inside
from configs.s3_errors import MissingBucket


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

    def __fspath__(self) -> str:
        return str(self)

    def stat(self) -> s3.Found:
        return s3.head(str(self))

    def is_file(self) -> bool:
        """Whether there is an object. A FileNotFoundError if not even the bucket is there."""
        try:
            self.stat()
        except MissingBucket:
            raise
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return next(s3.list_objects(f"{self}/"), None) is not None

    def iterdir(self) -> Iterator["S3Path"]:
        """The files and folders directly in it. A UserError for a key that no path can have, such as `a//b`."""
        return (self / require_inside(name.removesuffix("/"), str(self)) for name in s3.list_folder(str(self), "/"))

    def open(self, mode: str = "rb", buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
        """Only the bytes that are asked for are fetched, `buffering` of them or more at a time."""
        assert mode == "rb"
        return io.BufferedReader(RemoteFile(str(self)), max(1, buffering))

    def read_bytes(self) -> bytes:
        return s3.read(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)
