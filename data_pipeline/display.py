"""How a video's frames become RGB pictures, as a player shows them."""

import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from threading import get_ident
from typing import NamedTuple, cast

import av
import av.error
import cv2
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData, Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc, VideoReformatter

from configs.errors import UserError

# The numbers of ITU-T H.273 (AVColorSpace, AVColorTransferCharacteristic, AVColorPrimaries).
UNSPECIFIED = (2, 3)  # 3 is reserved; encoders have written it for "unknown"
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}  # those that can be shown, with swscale's numbers
BT709, BT601 = 1, 5
HD = 577, 1280  # rows, columns from which players take untagged video for BT.709 (mpv, mp_csp_guess_colorspace)
SHOWN_AS_THEY_ARE = (1, *UNSPECIFIED, 4, 5, 6, 7, 11, 12, 13, 14, 15)  # transfers of displays with the usual contrast
HDR = {16: " (PQ, high dynamic range)", 18: " (HLG, high dynamic range)"}
LIKE_SRGB = (1, *UNSPECIFIED, 4, 5, 6, 7, 22)  # primaries that players show as if they were those of the screen
ASPECTS = 1 / 4, 4.0  # of a pixel, width to height; what is beyond is no picture
SQUARE = 0.01  # a pixel whose sides differ by less is square: encoders round
REFUSED = {
    "SPHERICAL": "a spherical video", "STEREO3D": "a stereoscopic video",
    "DOVI_RPU_BUFFER": "Dolby Vision", "DOVI_METADATA": "Dolby Vision",
}  # fmt: skip
NOT_SHOWN = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Matroska's elements: those around a track's picture, and pixels to cut off at the bottom, top, left and right.
TRACK = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
CROPS = b"\x54\xaa", b"\x54\xbb", b"\x54\xcc", b"\x54\xdd"
REMEDY = "convert it to an H.264 mp4 (yuv420p, BT.709, square pixels)"


class FrameTags(NamedTuple):
    """How a frame is to be shown; all frames of a video must say the same."""

    width: int  # px
    height: int  # px
    format: str
    matrix: int
    range: int
    transfer: int
    primaries: int
    turned_deg: int  # counter-clockwise; mirrored frames say half a turn, too
    interlaced: bool


def choose_stream(container: InputContainer, path: str | Path) -> av.VideoStream:
    """The file's video, or the default one of several; covers and thumbnails do not count."""
    streams = [stream for stream in container.streams.video if not stream.disposition & NOT_SHOWN]
    default = [stream for stream in streams if stream.disposition & Disposition.default]
    chosen = streams if len(streams) == 1 else default
    if len(chosen) != 1:
        raise UserError(f"{path} holds {len(streams)} videos, {len(default)} of them the default; keep the right one")
    if chosen[0].codec_context is None:
        raise UserError(f"{path} holds a video that nothing here can decode; {REMEDY}")
    return chosen[0]


class Display:
    """Turns the frames of one video into pictures."""

    def __init__(self, path: str | Path, container: InputContainer, stream: av.VideoStream) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.changes = ""  # how the stored pictures are changed; empty if they are shown as they are stored
        self._tags: FrameTags | None = None

    def picture(self, frame: VideoFrame, number: int) -> np.ndarray:
        """Frame `number` as (h w 3) uint8 RGB, cropped, stretched, turned and mirrored as the file says.

        UserError for what cannot be shown so, and for a frame with other tags than those before it.
        """
        colours = frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries
        shape = frame.width, frame.height, frame.format.name
        tags = FrameTags(*shape, *colours, frame.rotation, frame.interlaced_frame)
        if self._tags is None:
            self._prepare(frame, tags)
        for name, was, now in zip(FrameTags._fields, self._tags or (), tags, strict=True):
            if now != was:
                raise UserError(f"{self.path}: the {name} of frame {number} is {now}, before it was {was}; {REMEDY}")
        return self._shown(self._to_rgb(frame, tags, number))

    def _prepare(self, frame: VideoFrame, tags: FrameTags) -> None:
        """Reads from the first frame and the stream what is to be done with every frame."""
        aspect = float(self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio or 1)
        transfer = f"the transfer characteristic {tags.transfer}{HDR.get(tags.transfer, '')}"
        known_matrix = frame.format.is_rgb or tags.matrix in (*MATRICES, *UNSPECIFIED)
        refused = {
            transfer: tags.transfer not in SHOWN_AS_THEY_ARE,
            "interlaced frames": tags.interlaced,
            f"the colour matrix {tags.matrix}": not known_matrix,
            "transparent pixels": self.stream.metadata.get("alpha_mode") == "1",
            f"pixels {aspect:.3g} times as wide as high": not ASPECTS[0] <= aspect <= ASPECTS[1],
        }
        for what, applies in refused.items():
            if applies:
                raise self._refuse(f"a video with {what}")
        self._tags, self._turn = tags, self._read_turn(frame, tags)
        self._crop = _read_cropping(self.container, self.stream)
        self._aspect = 1.0 if abs(aspect - 1) < SQUARE else aspect
        changes = {
            "cropped": self._crop is not None,
            f"stretched (pixels are {aspect:.3g} times as wide as high)": self._aspect != 1,
            "turned or mirrored": any(self._turn),
        }
        self.changes = ", ".join(change for change, applies in changes.items() if applies)

    def _read_turn(self, frame: VideoFrame, tags: FrameTags) -> tuple[bool, bool, bool]:
        """Whether rows and columns are exchanged, and then whether each is reversed."""
        try:
            data = {side.type.name: bytes(side) for side in cast(Iterable[SideData], frame.side_data)}
        except ValueError:  # PyAV does not know a kind that FFmpeg knows (Exif)
            data = {}
        for name in REFUSED.keys() & data.keys():
            if name != "STEREO3D" or any(data[name][:4]):  # type 0 is a flat picture
                raise self._refuse(REFUSED[name])
        # A stored point (x, y) is shown at (a x + c y, b x + d y), apart from an offset.
        matrix = data.get(Type.DISPLAYMATRIX.name)
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
        straight, crossed = a and d and not b and not c, b and c and not a and not d
        if not (straight or crossed) or (tags.turned_deg and not matrix):
            raise self._refuse(f"a video that is turned by {-tags.turned_deg} degrees")
        return (True, b < 0, c < 0) if crossed else (False, d < 0, a < 0)

    def _to_rgb(self, frame: VideoFrame, tags: FrameTags, number: int) -> np.ndarray:
        guess = BT709 if tags.height >= HD[0] or tags.width >= HD[1] else BT601
        like = {"src_colorspace": MATRICES.get(tags.matrix, guess)}
        if tags.primaries not in LIKE_SRGB:
            same = ColorTrc.BT709 if tags.transfer in UNSPECIFIED else tags.transfer  # grey stays as it is
            like |= {"dst_color_trc": same, "dst_color_primaries": ColorPrimaries.BT709}
        alpha = any(component.is_alpha for component in frame.format.components)
        converted = _reformatter(get_ident(), tags).reformat(frame, format="rgba" if alpha else "rgb24", **like)
        pixels = converted.to_ndarray()
        if alpha and pixels[..., 3].min() < 255:
            raise self._refuse(f"frame {number} with transparent pixels")
        return pixels[..., :3]

    def _shown(self, picture: np.ndarray) -> np.ndarray:
        picture = picture if self._crop is None else picture[self._crop]
        if self._aspect != 1:
            h, w = picture.shape[:2]
            size = round(w * max(self._aspect, 1)), round(h * max(1 / self._aspect, 1))
            picture = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_CUBIC)
        transposed, rows, columns = self._turn
        picture = picture.transpose(1, 0, 2) if transposed else picture
        return np.ascontiguousarray(picture[:: -1 if rows else 1, :: -1 if columns else 1])

    def _refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what} cannot be read as players show it; {REMEDY}")


@lru_cache(maxsize=16)
def _reformatter(thread: int, tags: FrameTags) -> VideoReformatter:
    """One per thread and tags: for primaries unlike the screen's, setting it up takes a second or more."""
    return VideoReformatter()


def _read_cropping(container: InputContainer, stream: av.VideoStream) -> tuple[slice, slice] | None:
    """Rows and columns that the container (mp4's clap, Matroska's PixelCrop) leaves; the decoder crops by itself.

    PyAV gives no access to it, but a Matroska header made for the same stream says it.
    """
    if not {"mp4", "matroska"} & set(container.format.name.split(",")):
        return None
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="matroska") as header:
            header.add_stream_from_template(stream)
            header.start_encoding()
    except (av.error.FFmpegError, ValueError):  # a codec that Matroska does not know has no such header
        return None
    data, at, pixels = file.getvalue(), 0, dict.fromkeys(CROPS, 0)
    while at < len(data) and data[at]:  # RFC 8794: leading zero bits say how long an element's id and its size are
        name = data[at : at + 9 - data[at].bit_length()]
        at += len(name)
        first = at + 9 - data[at].bit_length()
        size = int.from_bytes(data[at:first], "big") & ((1 << 7 * (first - at)) - 1)
        if name in CROPS:
            pixels[name] = int.from_bytes(data[first : first + size], "big")
        at = first if name in TRACK else first + size
    bottom, top, left, right = pixels.values()
    return (slice(top, -bottom or None), slice(left, -right or None)) if any(pixels.values()) else None
