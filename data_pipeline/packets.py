"""Where a video's frames are in its file, and how one is reached; a damaged frame is never taken for a whole one.

Our own videos have a checksum of their pictures, since an H.264 decoder does not see every altered byte. It is an mp4
box at the end of the file, which players skip and converters leave out.
"""

import hashlib
import os
import struct
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
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
    """Opens a video, of a server `buffer_bytes` at a time; FFmpeg's errors in the block become a UserError."""
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
    """How many frames are shown, if the file has a table of them (with those that an edit list hides).

    UserError if the file ends before its frames do.
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
    """The packets of the video at `path`; those of the last few videos are cached."""
    packets = _cached_packets(storage.path(path), storage.version(path))
    if packets is None:
        raise UserError(f"{path} does not say when its frames are shown; convert it to mp4")
    return packets


@lru_cache(maxsize=16)  # a video that is read in parts is gone through once; 17 bytes a frame
def _cached_packets(path: Path, version: Hashable) -> Packets | None:
    # From a server, only the index of a file is read, where frames are shown in the order in which they are stored.
    if storage.is_s3(path):
        with opened(path, PROBE_BYTES) as container:
            stream = choose_stream(container, path)
            if count_indexed(container, stream, path) and not stream.codec_context.reorder_depth:
                first = next(container.demux(stream))
                late = (first.pts or 0) - (first.dts or 0)
                shown = [entry for entry in stream.index_entries if not entry.is_discard]
                return _packets([(it.timestamp + late, it.timestamp, it.is_keyframe) for it in shown], stream)
    with opened(path) as container:
        return _read_packets(container, choose_stream(container, path))


def _read_packets(container: InputContainer, stream: av.VideoStream) -> Packets | None:
    """None if a packet does not say when its frame is shown."""
    rows = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            if packet.pts is None:
                return None
            dts = packet.pts if packet.dts is None else packet.dts  # Matroska, which seeks by pts, leaves some out
            rows.append((packet.pts, dts, packet.is_keyframe))
    return _packets(rows, stream)


def _packets(rows: list[tuple[int, int, bool]], stream: av.VideoStream) -> Packets:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Packets(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].astype(bool), float(stream.time_base or 0))


def decode_from(
    container: InputContainer, stream: av.VideoStream, path: str | Path, start: int
) -> Iterator[VideoFrame]:
    """Decoded frames from number `start` on, reached from the last key frame that is shown no later.

    DamagedVideoError for a frame that does not come in its place: decoders leave out what they cannot decode.
    """
    packets = packets_of(path) if start else _cached_packets(storage.path(path), storage.version(path))
    shown, begin, number = np.sort(packets.pts) if packets else (), None, start
    if start and packets:
        if start >= len(shown):
            return
        if "mp4" not in container.format.name or stream.frames < len(shown):
            _read_packets(container, stream)  # no table of frames in front: only what was read is surely found
        # What stands behind a key frame in the file may be shown before it: pts chooses the key frame, dts finds it.
        keys = np.flatnonzero(packets.key & (packets.pts <= shown[start]))
        key = keys[np.argmax(packets.dts[keys])] if len(keys) else 0
        container.seek(int(packets.dts[key]), stream=stream)
        begin = packets.pts[key]
    for frame in container.decode(stream):
        if begin is not None and (frame.pts is None or frame.pts < begin):
            continue  # it needs frames before the key frame
        if frame.is_corrupt:  # FFmpeg makes up what is missing
            raise damaged(path, number)
        if begin is not None and frame.pts < shown[start]:
            continue
        if frame.pts is not None and number < len(shown) and frame.pts != shown[number]:
            raise damaged(path, number, ", which does not come in its place")
        yield frame
        number += 1


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


def append_checksum(file: BinaryIO) -> None:
    """Adds the checksum of an mp4's pictures to its end."""
    checksum = CHECKSUM.pack(*CHECKSUM_HEAD, _hash_pictures(file))
    file.seek(0, os.SEEK_END)
    file.write(checksum)


def _hash_pictures(file: BinaryIO) -> bytes:
    """SHA-256 of what is in an mp4's `mdat` boxes."""
    digest, size, begin = hashlib.sha256(), file.seek(0, os.SEEK_END), 0
    while begin + 8 <= size:
        file.seek(begin)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        end = begin + length if length else size
        if not begin + 8 <= end <= size:
            break
        left = end - file.tell() if kind == b"mdat" else 0
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        begin = end
    return digest.digest()


def damaged(path: str | Path, number: int, how: str = "") -> DamagedVideoError:
    where = f"in or before its frame {number}{how}"
    return DamagedVideoError(f"{path} is damaged or truncated {where}; convert, copy or record it again")
