"""Video files: frames in, frames out, and what a file says about itself. PyAV, exact and without system libraries."""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import cv2
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from einops import rearrange
from torch import Tensor

from data_pipeline import storage

PROBE_BYTES = 256 << 10  # of a video on a server that is only asked what it is


class VideoInfo(NamedTuple):
    """What a video file says about itself."""

    fps: float
    frames: int
    height: int  # px
    width: int  # px


def probe(path: str | Path) -> VideoInfo:
    """Frames per second, number of frames and size in pixels; counted packet by packet where the file does not say."""
    try:
        with _opened(path, PROBE_BYTES) as container:
            stream = _video_stream(container, path)
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            return VideoInfo(float(stream.average_rate or 0), frames, stream.height, stream.width)
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from error


def read_frames(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Frames `start` to before `stop` (default: all) in order, (h w 3) uint8 RGB, the same as when all are decoded.

    A file that ends early or cannot be decoded raises ValueError.
    """
    count = start
    try:
        with _opened(path) as container:
            stream = _video_stream(container, path)
            stream.thread_type = "AUTO"  # frames in parallel: 2,050 against 990 frames/s of 160 x 96 on two cores
            wanted = islice(_decode_from(container, stream, path, start), None if stop is None else stop - start)
            convert = VideoReformatter()  # one for all: each frame's own would set up the conversion anew
            for frame in wanted:
                yield convert.reformat(frame, format="rgb24").to_ndarray()
                count += 1
            promised = stream.frames if stop is None else stop
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from error
    if count == start or count < promised:
        raise ValueError(f"{path} is truncated: {count} of {promised} frames can be decoded; copy or record it again")


def frame_times(path: str | Path) -> np.ndarray:
    """When each frame is shown, (n) seconds in ascending order, as the file says it; nothing is decoded."""
    try:
        packets = _packets_of(path)
        return np.sort(packets.pts).astype(np.float64) * packets.unit_s
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from error


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float, crf: int = 18) -> None:
    """Writes (h w 3) uint8 RGB frames as H.264 yuv420p mp4, whole or not at all; height and width must be even.

    A key frame every second, so that a clip in the middle is cheap to reach. The same frames give the same bytes.
    """
    rate = Fraction(fps).limit_denominator(1001)
    # One thread, no B-frames and no macroblock tree for the sake of equal bytes: x264's lookahead reads memory that it
    # has not written, with the tree in up to 7 of 100 encodings; without it 0 of 1,900 differ, and processors with and
    # without AVX-512 agree, for 17 % more bytes and 0.3 dB.
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0", "x264-params": "mbtree=0"}
    # The file is opened by Python, not by FFmpeg, so that a full disk is an OSError here and not a short file.
    with storage.writing(path) as part, open(part, "wb") as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        stream.gop_size = max(1, round(fps))
        for count, frame in enumerate(frames):
            if count == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def fit_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frame (h w 3) resized to cover `height` x `width`, in proportion, and cropped at the centre."""
    h, w = frame.shape[:2]
    if (h, w) == (height, width):
        return frame
    scale = max(height / h, width / w)
    covered_h, covered_w = max(height, round(h * scale)), max(width, round(w * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    covered = cv2.resize(frame, (covered_w, covered_h), interpolation=how)
    top, left = (covered_h - height) // 2, (covered_w - width) // 2
    return np.ascontiguousarray(covered[top : top + height, left : left + width])


@contextmanager
def _opened(path: str | Path, buffer_bytes: int = storage.BUFFER_BYTES) -> Iterator[InputContainer]:
    """The file, wherever it lies; from a server come `buffer_bytes` at a time."""
    if not storage.path(path).is_file():
        raise FileNotFoundError(f"no video {path}")
    if not storage.is_s3(path):
        with av.open(str(path)) as container:
            yield container
        return
    with storage.opened(path, buffer_bytes) as file, av.open(file, "r") as container:
        yield container


def _video_stream(container: InputContainer, path: str | Path) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError(f"{path} holds no video")
    return container.streams.video[0]


class _Packets(NamedTuple):
    """One per frame in the order of the file, without those that an edit list hides."""

    pts: np.ndarray  # (n) when its frame is shown, in units
    dts: np.ndarray  # (n) where it stands in the file
    key: np.ndarray  # (n) bool
    unit_s: float


def _packets_of(path: str | Path) -> _Packets:
    return _kept_packets(storage.path(path), storage.version(path))


@lru_cache(maxsize=16)  # what is cut into parts is read through once, and not for each part; 17 bytes a frame are kept
def _kept_packets(path: Path, version: Hashable) -> _Packets:
    with _opened(path) as container:
        return _read_packets(container, _video_stream(container, path))


def _read_packets(container: InputContainer, stream: av.VideoStream) -> _Packets:
    rows = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            if packet.pts is None:
                raise ValueError(f"{container.name} does not say when its frames are shown; convert it to mp4")
            dts = packet.pts if packet.dts is None else packet.dts  # Matroska, which seeks by pts, leaves some out
            rows.append((packet.pts, dts, packet.is_keyframe))
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return _Packets(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].astype(bool), float(stream.time_base or 0))


def _decode_from(
    container: InputContainer, stream: av.VideoStream, path: str | Path, start: int
) -> Iterator[av.VideoFrame]:
    """Decoded frames from number `start` on, reached from the last key frame that is shown no later."""
    if start == 0:
        yield from container.decode(stream)
        return
    packets = _packets_of(path)
    if start >= len(packets.pts):
        return
    if "mp4" not in container.format.name or stream.frames < len(packets.pts):
        _read_packets(container, stream)  # no table of frames in front: only what was read is surely found
    first = int(np.sort(packets.pts)[start])
    # What stands behind a key frame in the file may be shown before it, so pts chooses the key frame and dts finds it.
    keys = packets.dts[packets.key & (packets.pts <= first)]
    container.seek(int(keys.max() if len(keys) else packets.dts[0]), stream=stream)
    frames = (frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= first)
    for i, frame in enumerate(frames):
        if i == 0 and frame.pts != first:
            raise ValueError(f"frame {start} of {container.name} cannot be reached alone; convert it to H.264 mp4")
        yield frame


def _unreadable(path: str | Path, error: av.error.FFmpegError) -> ValueError:
    return ValueError(f"cannot read the video {path} ({error.strerror}); it is truncated or no video")


def to_uint8(video: Tensor) -> Tensor:
    """(b 3 n h w) in [-1, 1] -> (b n h w 3) uint8, rounded."""
    return rearrange(((video.float() + 1) * 127.5).round().to(torch.uint8), "b c n h w -> b n h w c")


def to_video(frames: Tensor) -> Tensor:
    """(b n h w 3) uint8 -> (b 3 n h w) in [-1, 1]."""
    return rearrange(frames, "b n h w c -> b c n h w").float() / 127.5 - 1
