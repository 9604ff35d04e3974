"""Where a video's frames are in its file, and how one is reached; a damaged frame is never taken for a whole one.

Our own videos have a checksum of their pictures, since an H.264 decoder does not see every altered byte. It is an mp4
box at the end of the file, which players skip and converters leave out.
"""

import errno
import hashlib
import os
import struct
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.index import IndexEntry
from av.video.frame import VideoFrame

from configs import storage
from configs.errors import MissingFileError, UserError
from data_pipeline.display import choose_stream

CHECKSUM_BYTES = 56
CHECKSUM_HEAD = struct.pack(">I4s16s", CHECKSUM_BYTES, b"uuid", b"worldloom sha256")  # a box: its size, kind and id
PROBE_BYTES = 256 << 10  # of a video on a server that is only asked what it is
# FFmpeg's demuxers of files that hold a video themselves: playlists and scripts would have it open other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,mxf,nut,ivf,dv,rm,wtv,"
    "h264,hevc,av1,obu,m4v,mjpeg,yuv4mpegpipe,gif"
)


@contextmanager
def opened(
    path: str | Path, buffer_bytes: int = storage.BUFFER_BYTES
) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """A file and the video in it, read `buffer_bytes` at a time from a server; FFmpeg's errors become a UserError.

    FFmpeg gets an open file, since it could take a path for a protocol, and reads no names but UTF-8.
    """
    if not storage.path(path).is_file():
        raise MissingFileError(f"no video {path}")
    options: Any = {"container_options": {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}}
    try:
        with (
            storage.open(path, buffer_bytes) as file,
            av.open(file, "r", metadata_errors="replace", **options) as container,
        ):
            yield container, choose_stream(container, path)
    except (av.error.FFmpegError, OSError) as error:  # EINVAL: it was told to seek before the file's beginning
        if not isinstance(error, av.error.FFmpegError) and error.errno != errno.EINVAL:
            raise
        raise UserError(f"cannot read the video {path} ({error.strerror}); it is truncated or no video") from error


class Packets(NamedTuple):
    """One per frame in the order of the file, without those that an edit list hides."""

    pts: np.ndarray  # (n) when its frame is shown, in units
    dts: np.ndarray  # (n) where it stands in the file
    key: np.ndarray  # (n) bool
    unit_s: float


def read_packets(path: str | Path) -> Packets:
    """The packets of the video at `path`; those of the last few videos are cached.

    UserError for a video that ends before its frames do, that does not say when they are shown, or that is ours and
    has other pictures than its checksum says (on a server the checksum is not read).
    """
    return _read_packets(storage.path(path), storage.version(path))


@lru_cache(maxsize=16)  # a video that is read in parts is gone through once; 17 bytes a frame
def _read_packets(path: Path, version: Hashable) -> Packets:
    if not storage.is_s3(path):
        _require_unaltered(path)
    else:  # only the index is read, where frames are shown in the order in which they are stored
        with opened(path, PROBE_BYTES) as (container, stream):
            index = _read_index(container, stream, path)
            if index and not stream.codec_context.reorder_depth:
                first = next(container.demux(stream))
                late = (first.pts or 0) - (first.dts or 0)
                shown = [entry for entry in index if not entry.is_discard]
                return _tabulate([(it.timestamp + late, it.timestamp, it.is_keyframe) for it in shown], stream)
    with opened(path) as (container, stream):
        _read_index(container, stream, path)
        rows = [(it.pts, it.dts, it.is_keyframe) for it in container.demux(stream) if it.size and not it.is_discard]
        if any(pts is None for pts, _, _ in rows):
            raise UserError(f"{path} does not say when its frames are shown; convert it to mp4")
        # Matroska, which seeks by pts, leaves some dts out.
        return _tabulate([(pts, pts if dts is None else dts, key) for pts, dts, key in rows], stream)


def _tabulate(rows: list[tuple[Any, Any, bool]], stream: av.VideoStream) -> Packets:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Packets(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].astype(bool), float(stream.time_base or 0))


def _read_index(container: InputContainer, stream: av.VideoStream, path: Path) -> list[IndexEntry]:
    """An mp4's table of frames (with those that an edit list hides). UserError if the file ends before they do."""
    entries = list(stream.index_entries) if "mp4" in container.format.name and stream.frames else []
    there = sum(entry.pos + entry.size <= container.size for entry in entries)
    if there < len(entries):
        raise UserError(f"{path} is truncated: {there} of {len(entries)} frames are there; copy or record it again")
    return entries


def decode_from(
    container: InputContainer, stream: av.VideoStream, path: str | Path, start: int
) -> Iterator[VideoFrame]:
    """Decoded frames from number `start` on, reached from the last key frame that is shown no later.

    UserError for a frame that does not come in its place: decoders leave out what they cannot decode.
    """
    packets = read_packets(path)
    shown, begin, number = np.sort(packets.pts), None, start
    if start >= len(shown):
        return
    if start:
        if "mp4" not in container.format.name or stream.frames < len(shown):
            for _ in container.demux(stream):  # no table of frames in front: only what was read is surely found
                pass
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


def damaged(path: str | Path, number: int, how: str = "") -> UserError:
    where = f"in or before its frame {number}{how}"
    return UserError(f"{path} is damaged or truncated {where}; convert, copy or record it again")


def _require_unaltered(path: Path) -> None:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - CHECKSUM_BYTES))
        checksum = file.read()
        if checksum.startswith(CHECKSUM_HEAD):
            file.seek(0)
            if make_checksum(file.read()) != checksum:
                raise UserError(f"{path} is damaged: its checksum is of other pictures; copy or record it again")


def make_checksum(mp4: bytes) -> bytes:
    """The box with the SHA-256 of what is in an mp4's `mdat` boxes."""
    digest, begin, data = hashlib.sha256(), 0, memoryview(mp4)
    while begin + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, begin)
        first = begin + 8
        if length == 1:
            first, length = begin + 16, int.from_bytes(data[begin + 8 : begin + 16], "big")
        if length < 8:
            break
        if kind == b"mdat":
            digest.update(data[first : begin + length])
        begin += length
    return CHECKSUM_HEAD + digest.digest()
