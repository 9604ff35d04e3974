"""Small videos of others: encoded, and copied packet by packet with what containers may say of them."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np

H264 = {"crf": "12", "bf": "0", "threads": "1"}
CORNER = (230, 230, 230)  # of the one bright corner of `corner_frames`, top left


def corner_frames(count: int = 6, height: int = 64, width: int = 96) -> Iterable[np.ndarray]:
    """Grey pictures (h w 3) with a bright top left corner and a dark top right one."""
    for _ in range(count):
        picture = np.full((height, width, 3), 128, np.uint8)
        picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = CORNER, 20
        yield picture


def numbered_frames(count: int, step: int = 3) -> Iterable[np.ndarray]:
    """Pictures that are brighter by `step` each."""
    return (np.full((64, 64, 3), step * i, np.uint8) for i in range(count))


def write_foreign(
    path: Path,
    frames: Iterable[np.ndarray],
    prepare: Callable[[av.VideoStream], Any] = lambda stream: None,
    codec: str = "libx264",
    options: dict[str, str] = H264,
    change: Callable[[av.VideoFrame], av.VideoFrame] = lambda frame: frame,
) -> Path:
    """20 frames a second, a key frame every 20; `prepare` changes the stream, `change` each frame."""
    with av.open(str(path), "w") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=20, options=options))
        stream.pix_fmt, stream.gop_size = "yuv420p", 20
        prepare(stream)
        for i, picture in enumerate(frames):
            if i == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = change(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            frame.pts, frame.time_base = i, Fraction(1, 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy_packets(
    source: Path,
    target: Path,
    retime: Callable[[int, float], float] = lambda i, t: t,
    prepare: Callable[[av.VideoStream], Any] = lambda stream: None,
    **how: Any,
) -> Path:
    """The same packets; number i, shown at t seconds, is shown at `retime(i, t)`; `prepare` changes the stream."""
    with av.open(str(source)) as original, av.open(str(target), "w", **how) as copy:
        before = original.streams.video[0]
        stream = copy.add_stream_from_template(before)
        prepare(stream)
        unit = float(before.time_base or 1)
        for i, packet in enumerate(packet for packet in original.demux(before) if packet.size):
            assert packet.pts is not None and packet.dts is not None
            moved = round((retime(i, packet.pts * unit) - packet.pts * unit) / unit)
            packet.pts, packet.dts, packet.stream = packet.pts + moved, packet.dts + moved, stream
            copy.mux(packet)
    return target


def change_packets(video: Path, *args: Any, **how: Any) -> None:
    """`copy_packets` in place; a copy of one of our own videos has no checksum."""
    copy_packets(video, video.with_name("copy.mp4"), *args, **how).rename(video)


def add_box(path: Path, box: bytes, inside: bytes = b"avc1") -> None:
    """Puts a box behind the others of an mp4's sample description; its tables must be at the end of the file."""
    data = bytearray(path.read_bytes())
    start = data.find(inside, data.find(b"stsd")) - 4
    end = start + int.from_bytes(data[start : start + 4], "big")
    data[end:end] = box
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", inside):
        at = start if name == inside else data.find(name) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + len(box)).to_bytes(4, "big")
    path.write_bytes(data)
