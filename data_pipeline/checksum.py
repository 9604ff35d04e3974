"""A checksum in an mp4, over its pictures: an H.264 decoder does not see every altered byte, this does.

It is a box of its own at the end of the file, which players pass over and converters leave out.
"""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

UUID = b"worldloom sha256"  # 16 bytes, the kind of a `uuid` box
BOX = struct.Struct(">I4s16s32s")


class Box(NamedTuple):
    """One of an mp4's outermost boxes."""

    kind: bytes
    first: int  # byte of what is in it
    end: int  # one past its last byte


def append_checksum(path: Path) -> None:
    """Adds the checksum of an mp4's pictures to its end."""
    with open(path, "rb+") as file:
        digest = _digest(file)
        file.seek(0, 2)
        file.write(BOX.pack(BOX.size, b"uuid", UUID, digest))


def is_altered(path: Path) -> bool:
    """Whether an mp4 has a checksum that its pictures do not have. Reads all of those that have one."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < BOX.size:
            return False
        file.seek(size - BOX.size)
        length, kind, uuid, digest = BOX.unpack(file.read(BOX.size))
        if (length, kind, uuid) != (BOX.size, b"uuid", UUID):
            return False
        return _digest(file) != digest


def _digest(file: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    for box in _boxes(file):
        if box.kind == b"mdat":
            file.seek(box.first)
            left = box.end - box.first
            while left and (piece := file.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
    return digest.digest()


def _boxes(file: BinaryIO) -> Iterator[Box]:
    size, place = file.seek(0, 2), 0
    while place + 8 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        first = place + 8
        if length == 1:
            length, first = int.from_bytes(file.read(8), "big"), place + 16
        end = size if length == 0 else place + length
        if end <= place + 7 or end > size:
            return
        yield Box(kind, first, end)
        place = end
