"""An s3:// url that can be asked what a Path is asked: readers of recordings need not know where their files lie."""

import os
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath

from configs import s3
from configs.errors import UserError
from configs.foreign import require_inside
from configs.s3_errors import MissingBucket, bucket_and_key

NAME_BYTES = 255  # of a file's name, on every usual file system


class S3Path(PurePosixPath):
    """`s3://bucket/key`; its parts, names and suffixes are a path's own."""

    def __str__(self) -> str:
        return "s3://" + "/".join(self.parts[1:])

    def __fspath__(self) -> str:
        return str(self)

    def is_file(self) -> bool:
        """Whether there is an object. Raises FileNotFoundError if not even the bucket is there."""
        try:
            s3.head(str(self))
        except MissingBucket:
            raise
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects in it."""
        return next(s3.list_objects(f"{self}/"), None) is not None

    def iterdir(self) -> Iterator["S3Path"]:
        """The files and folders directly in it. Raises ValueError for a key that no path can have, as `a//b`."""
        prefix = bucket_and_key(f"{self}/")[1]
        for found in s3.list_objects(f"{self}/", "/"):
            if found.key != prefix:  # an object that some programs make for a folder
                yield self / require_inside(found.key.removeprefix(prefix).removesuffix("/"), str(self))

    def read_bytes(self) -> bytes:
        return s3.read(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)


def require_files(url: str, names: Collection[str]) -> None:
    """Raises ValueError in one line unless a folder of this machine can hold files of these `names`, and they lead to
    no place outside of it: whoever writes to a bucket chooses the keys of its objects."""
    folders = {above for name in names for above in _folders_of(name)}
    for name in names:
        try:
            require_inside(name, url)
            refused = name in folders or any(len(os.fsencode(part)) > NAME_BYTES for part in name.split("/"))
        except ValueError:  # also of characters that no name here can have
            refused = True
        if refused:
            shown = name if len(name) <= 200 else f"{name[:200]}..."
            raise UserError(f"{url} holds an object named {shown!r}, which is no file of a folder; it was not copied")


def _folders_of(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
