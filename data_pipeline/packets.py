"""Where a video's frames lie in its file, and how one is reached; no frame that is damaged passes for a whole one.

Our own videos have a checksum of their pictures, since an H.264 decoder does not see every altered byte. It is an mp4
box at the end of the file, which players pass over and converters leave out.
"""

import hashlib
import os
import struct
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame

from configs import storage
from configs.errors import MissingFileError, UserError
from data_pipeline.display import choose_stream

CHECKSUM = struct.Struct(">I4s16s32s")  # a `uuid` box: its size and kind, which of them it is, and the checksum
CHECKSUM_HEAD = (CHECKSUM.size, b"uuid", b"worldloom sha256")
PROBE_BYTES = 256 << 10  # of a video on a server that is only asked what it is
# FFmpeg's demuxers of files that hold a video themselves: playlists and scripts would have it open other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,mxf,nut,ivf,dv,rm,wtv,"
    "h264,hevc,av1,obu,m4v,mjpeg,yuv4mpegpipe,gif"
)


@contextmanager
def opened(path: str | Path, buffer_bytes: int = storage.BUFFER_BYTES) -> Iterator[InputContainer]:
    """The file, wherever it lies, if it holds a video itself; from a server come `buffer_bytes` at a time.

    What FFmpeg says of it in the block is a UserError.
    """
    if not storage.path(path).is_file():
        raise MissingFileError(f"no video {path}")
    only: Any = {"container_options": {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}}
    only["metadata_errors"] = "replace"
    utf8 = str(path).encode(errors="ignore") == os.fsencode(path)  # PyAV takes no other names
    try:
        if utf8 and not storage.is_s3(path):
            with av.open(f"file:{path}", "r", **only) as container:  # else a name could be taken for a protocol
                yield container
        else:
            with storage.open(path, buffer_bytes) as file, av.open(file, "r", **only) as container:
                yield container
    except av.error.FFmpegError as error:
        raise UserError(f"cannot read the video {path} ({error.strerror}); it is truncated or no video") from error


def count_indexed(container: InputContainer, stream: av.VideoStream, path: str | Path) -> int | None:
    """How many frames are shown, if the file has one table of them, in which those that an edit list hides stand too.

    A file that ends before its frames do is refused.
    """
    if "mp4" not in container.format.name or not stream.frames:
        return None
    entries = list(stream.index_entries)
    there = sum(entry.pos + entry.size <= container.size for entry in entries)
    if there < len(entries):
        raise UserError(f"{path} is truncated: {there} of {len(entries)} frames are there; copy or record it again")
    return sum(not entry.is_discard for entry in entries)


class DamagedVideoError(UserError):
    """A video whose pictures are not those that were encoded."""


class Packets(NamedTuple):
    """One per frame in the order of the file, without those that an edit list hides."""

    pts: np.ndarray  # (n) when its frame is shown, in units
    dts: np.ndarray  # (n) where it stands in the file
    key: np.ndarray  # (n) bool
    unit_s: float


def packets_of(path: str | Path) -> Packets:
    """Of the video of the file at `path`; what was read last is kept."""
    return _cached_packets(storage.path(path), storage.version(path))


@lru_cache(maxsize=16)  # what is cut into parts is read through once, and not for each part; 17 bytes a frame are kept
def _cached_packets(path: Path, version: Hashable) -> Packets:
    # From a server, only the index of a file is read, where frames are shown in the order in which they are stored.
    if storage.is_s3(path):
        with opened(path, PROBE_BYTES) as container:
            stream = choose_stream(container, path)
            if count_indexed(container, stream, path) and not stream.codec_context.reorder_depth:
                first = next(container.demux(stream))
                late = (first.pts or 0) - (first.dts or 0)
                entries = [one for one in stream.index_entries if not one.is_discard]
                return _packets([(one.timestamp + late, one.timestamp, one.is_keyframe) for one in entries], stream)
    with opened(path) as container:
        return _read_packets(container, choose_stream(container, path), path)


def _read_packets(container: InputContainer, stream: av.VideoStream, path: str | Path) -> Packets:
    rows = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            if packet.pts is None:
                raise UserError(f"{path} does not say when its frames are shown; convert it to mp4")
            dts = packet.pts if packet.dts is None else packet.dts  # Matroska, which seeks by pts, leaves some out
            rows.append((packet.pts, dts, packet.is_keyframe))
    return _packets(rows, stream)


def _packets(rows: list[tuple[int, int, bool]], stream: av.VideoStream) -> Packets:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Packets(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].astype(bool), float(stream.time_base or 0))


def decode_from(
    container: InputContainer, stream: av.VideoStream, path: str | Path, start: int
) -> Iterator[VideoFrame]:
    """Decoded frames from number `start` on, reached from the last key frame that is shown no later."""
    if start == 0:
        for i, frame in enumerate(_decode(container, stream, path)):
            yield undamaged(frame, path, i)
        return
    packets = packets_of(path)
    if start >= len(packets.pts):
        return
    if "mp4" not in container.format.name or stream.frames < len(packets.pts):
        _read_packets(container, stream, path)  # no table of frames in front: only what was read is surely found
    first = int(np.sort(packets.pts)[start])
    # What stands behind a key frame in the file may be shown before it, so pts chooses the key frame and dts finds it.
    keys = np.flatnonzero(packets.key & (packets.pts <= first))
    key = keys[np.argmax(packets.dts[keys])] if len(keys) else 0
    container.seek(int(packets.dts[key]), stream=stream)
    number = start
    for frame in _decode(container, stream, path, start, first):
        if frame.pts is None or frame.pts < packets.pts[key]:
            continue  # it needs frames before the key frame
        undamaged(frame, path, number)
        if frame.pts < first:
            continue
        if number == start and frame.pts != first:
            raise UserError(f"frame {start} of {path} cannot be reached alone; convert it to H.264 mp4")
        yield frame
        number += 1


def _decode(
    container: InputContainer, stream: av.VideoStream, path: str | Path, number: int = 0, first: int | None = None
) -> Iterator[VideoFrame]:
    """Decoded frames. From frame `number` on, which is shown at `first`, a gap is refused: decoders leave out what they
    cannot decode, and players show what is left at its time."""
    due: list[int] = []  # when the frames are shown whose packets were read and that did not come yet
    known = True
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            known = known and packet.pts is not None  # AVI does not say it
            if packet.pts is not None and (first is None or packet.pts >= first):
                heappush(due, packet.pts)
        for frame in packet.decode():
            if known and due and frame.pts is not None and frame.pts >= due[0]:
                if heappop(due) < frame.pts:
                    raise DamagedVideoError(f"{path} is damaged or truncated in or before its frame {number}, which "
                                            "does not come in its place; convert, copy or record it again")  # fmt: skip
                number += 1
            yield frame


def undamaged(frame: VideoFrame, path: str | Path, number: int) -> VideoFrame:
    """The frame; refused if it is not what was encoded: FFmpeg makes up what is missing."""
    if frame.is_corrupt:
        raise damaged(path, number)
    return frame


def require_unaltered(path: str | Path) -> None:
    """Refuses a video of ours whose checksum says that its pictures were altered; not on a server."""
    if not storage.is_s3(path) and storage.path(path).is_file() and _is_altered(Path(path), storage.version(path)):
        raise DamagedVideoError(f"{path} is damaged: its checksum is of other pictures; copy or record it again")


@lru_cache(maxsize=256)
def _is_altered(path: Path, version: Hashable) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, 2) < CHECKSUM.size:
            return False
        file.seek(-CHECKSUM.size, 2)
        *head, digest = CHECKSUM.unpack(file.read(CHECKSUM.size))
        return tuple(head) == CHECKSUM_HEAD and _hash_pictures(file) != digest


def append_checksum(path: Path) -> None:
    """Adds the checksum of an mp4's pictures to its end."""
    with open(path, "rb+") as file:
        digest = _hash_pictures(file)
        file.seek(0, 2)
        file.write(CHECKSUM.pack(*CHECKSUM_HEAD, digest))


def _hash_pictures(file: BinaryIO) -> bytes:
    """SHA-256 of what is in an mp4's `mdat` boxes."""
    digest, size, begin = hashlib.sha256(), file.seek(0, 2), 0
    while begin + 8 <= size:
        file.seek(begin)
        length, kind = struct.unpack(">I4s", file.read(8))
        first = begin + 8
        if length == 1:
            length, first = int.from_bytes(file.read(8), "big"), begin + 16
        end = size if length == 0 else begin + length
        if not begin + 8 <= end <= size:
            break
        left = end - first if kind == b"mdat" else 0
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        begin = end
    return digest.digest()


def damaged(path: str | Path, number: int) -> DamagedVideoError:
    return DamagedVideoError(f"{path} is damaged or truncated in or before its frame {number}; copy or record it again")
