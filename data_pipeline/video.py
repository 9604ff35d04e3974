"""Video files: frames in, frames out, and what a file says about itself. PyAV, exact and without system libraries."""

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path

import av
import av.error
import cv2
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from einops import rearrange
from torch import Tensor

from configs import storage
from configs.errors import UserError
from data_pipeline.display import Display
from data_pipeline.packets import PROBE_BYTES, damaged, decode_from, make_checksum, opened, read_packets
from data_pipeline.types import Footage

LARGEST = 4  # times the pixels wanted: a longer picture is cut before it is resized


def probe(path: str | Path) -> Footage:
    """What the video says it holds, as a player shows it; the first frame is decoded.

    UserError for what cannot be read, or not be shown as a player does.
    """
    with opened(path, PROBE_BYTES) as (container, stream):
        display = Display(path, container, stream)
        first = next(decode_from(container, stream, path, 0), None)
        if first is None:
            raise UserError(f"{path} is truncated: none of its frames can be decoded; copy or record it again")
        height, width = display.picture(first, 0).shape[:2]
    frames = len(read_packets(path).pts)
    return Footage(Path(path), frames, height, width, partial(read_frames, path), changes=display.changes)


def read_frames(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Frames `start` to before `stop` (default: all) in order, (h w 3) uint8 RGB as a player shows them, the same as
    when all are decoded. UserError for a file that ends early, or is damaged as far as the decoder sees it."""
    count = start
    with opened(path) as (container, stream):
        stop = len(read_packets(path).pts) if stop is None else stop
        display = Display(path, container, stream)
        stream.thread_type = "AUTO"  # frames in parallel: 2,050 against 990 frames/s of 160 x 96 on two cores
        if stream.codec.intra_only:  # else they are marked as corrupt, and real files break the rules in small ways
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        try:
            for frame in islice(decode_from(container, stream, path, start), stop - start):
                yield display.picture(frame, count)
                count += 1
        except av.error.InvalidDataError as error:
            raise damaged(path, count) from error
    if count == start or count < stop:
        raise UserError(f"{path} is truncated: {count} of {stop} frames can be decoded; copy or record it again")


def frame_times(path: str | Path) -> np.ndarray:
    """When each frame is shown, (n) seconds in ascending order; nothing is decoded."""
    packets = read_packets(path)
    return np.sort(packets.pts).astype(np.float64) * packets.unit_s


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float, crf: int = 18) -> None:
    """Writes (h w 3) uint8 RGB frames as H.264 yuv420p mp4, whole or not at all; height and width must be even.

    A key frame every second, so that a clip in the middle is cheap to reach. The same frames give the same bytes, which
    are in memory until all are there. The colours are BT.709's, as the file says; its table of frames comes first, a
    checksum of its pictures last.
    """
    # One thread, no B-frames and no macroblock tree for the sake of equal bytes: x264's lookahead reads memory that it
    # has not written, with the tree in up to 7 of 100 encodings; without it 0 of 1,900 differ, and processors with and
    # without AVX-512 agree, for 17 % more bytes and 0.3 dB.
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0", "x264-params": "mbtree=0"}
    tags = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    convert, file = VideoReformatter(), io.BytesIO()
    # To put the table of frames first, FFmpeg reads what it has written.
    first = {"options": {"movflags": "faststart"}, "io_open": lambda *_: io.BytesIO(file.getvalue())}
    with storage.writing(path) as part:
        part.touch()  # where nothing can be written, this fails before the work
        with av.open(file, "w", format="mp4", **first) as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.pix_fmt, stream.gop_size = "yuv420p", max(1, round(fps))
            stream.color_range, stream.colorspace = ColorRange.MPEG, Colorspace.ITU709
            stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            for count, frame in enumerate(frames):
                if count == 0:
                    stream.height, stream.width = frame.shape[:2]
                picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(convert.reformat(picture, format="yuv420p", **tags)))
            container.mux(stream.encode())
        video = file.getvalue()
        part.write_bytes(video + make_checksum(video))


def fit_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """The frame (h w 3) resized to cover `height` x `width`, in proportion, and cropped at the centre."""
    h, w = frame.shape[:2]
    if (h, w) == (height, width):
        return frame
    scale = max(height / h, width / w)
    if scale * h * scale * w > LARGEST * height * width:  # 1 x 60,000 px would become 1.7 GB
        wanted_h, wanted_w = (min(size, ceil(2 * part / scale) + 2) for size, part in ((h, height), (w, width)))
        top, left = (h - wanted_h) // 2, (w - wanted_w) // 2
        frame, h, w = frame[top : top + wanted_h, left : left + wanted_w], wanted_h, wanted_w
    covered_h, covered_w = max(height, round(h * scale)), max(width, round(w * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    covered = cv2.resize(frame, (covered_w, covered_h), interpolation=interpolation)
    top, left = (covered_h - height) // 2, (covered_w - width) // 2
    return np.ascontiguousarray(covered[top : top + height, left : left + width])


def kept_share(size: tuple[int, int], height: int, width: int) -> float:
    """The share of a picture of `size` (h w) that `fit_frame` keeps."""
    aspect, wanted = size[1] / size[0], width / height
    return min(aspect / wanted, wanted / aspect)


def to_uint8(video: Tensor) -> Tensor:
    """(b 3 n h w) in [-1, 1] -> (b n h w 3) uint8, rounded."""
    return rearrange(((video.float() + 1) * 127.5).round().to(torch.uint8), "b c n h w -> b n h w c")


def to_video(frames: Tensor) -> Tensor:
    """(b n h w 3) uint8 -> (b 3 n h w) in [-1, 1]."""
    return rearrange(frames, "b n h w c -> b c n h w").float() / 127.5 - 1
