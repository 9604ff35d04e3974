"""Video files: frames in, frames out, and what a file says about itself. PyAV, exact and without system libraries."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import cv2
import numpy as np
from av.container import InputContainer
from einops import rearrange
from torch import Tensor

from configs.files import atomic_path


class VideoInfo(NamedTuple):
    """What a video file says about itself."""

    fps: float
    frames: int
    height: int  # px
    width: int  # px


def probe(path: str | Path) -> VideoInfo:
    """Frames per second, number of frames and size in pixels; counted packet by packet where the file does not say."""
    try:
        with av.open(str(_existing(path))) as container:
            stream = _video_stream(container, path)
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            return VideoInfo(float(stream.average_rate or 0), frames, stream.height, stream.width)
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from error


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Every frame in order, (h w 3) uint8 RGB. A file that ends early or cannot be decoded raises ValueError."""
    count = 0
    try:
        with av.open(str(_existing(path))) as container:
            stream = _video_stream(container, path)
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24")
                count += 1
            promised = stream.frames
    except av.error.FFmpegError as error:
        raise _unreadable(path, error) from error
    if count == 0 or count < promised:
        raise ValueError(f"{path} is truncated: {count} of {promised} frames can be decoded; copy or record it again")


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float, crf: int = 18) -> None:
    """Writes (h w 3) uint8 RGB frames as H.264 yuv420p mp4, whole or not at all; height and width must be even.

    A key frame every second, so that a clip in the middle is cheap to reach. The same frames give the same bytes.
    """
    rate = Fraction(fps).limit_denominator(1001)
    # One thread and no B-frames for the sake of equal bytes: with B-frames, x264's lookahead reads memory that it has
    # not written (two outcomes under different MALLOC_PERTURB_; one without, for 5 % more bytes).
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0"}
    # The file is opened by Python, not by FFmpeg, so that a full disk is an OSError here and not a short file.
    with atomic_path(path) as part, open(part, "wb") as file, av.open(file, "w", format="mp4") as container:
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


def _existing(path: str | Path) -> str | Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video {path}")
    return path


def _video_stream(container: InputContainer, path: str | Path) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError(f"{path} holds no video")
    return container.streams.video[0]


def _unreadable(path: str | Path, error: av.error.FFmpegError) -> ValueError:
    return ValueError(f"cannot read the video {path} ({error.strerror}); it is truncated or no video")


def to_video(frames: Tensor) -> Tensor:
    """(b n h w 3) uint8 -> (b 3 n h w) in [-1, 1]."""
    return rearrange(frames, "b n h w c -> b c n h w").float() / 127.5 - 1
