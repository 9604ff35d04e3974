"""What a video says of how it is to be shown is done or refused by name, and what is damaged is seen."""

import os
import re
import resource
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.frame import VideoFrame
from tiny_videos import CORNER, H264, add_box, copy_packets, corner_frames, numbered_frames, write_foreign

from data_pipeline.video import fit_frame, frame_times, probe, read_frames, write_video


def bright_corner(picture: np.ndarray) -> tuple[str, str]:
    """Where the bright corner is, and the dark one."""
    names = ["top left", "top right", "bottom left", "bottom right"]
    grey = [picture[y, x].mean() for y in (8, -8) for x in (8, -8)]
    return names[int(np.argmax(grey))], names[int(np.argmin(grey))]


def shades(path: Path, start: int = 0, stop: int | None = None) -> list[int]:
    """The numbers of `numbered_frames`."""
    return [round(float(picture.mean()) / 3) for picture in read_frames(path, start, stop)]


@pytest.mark.parametrize("reordered", ["0", "3"])
def test_frames_that_an_edit_list_hides_do_not_count(reordered, tmp_path):
    whole = write_foreign(tmp_path / "whole.mp4", numbered_frames(80), options={"crf": "12", "bf": reordered})
    options = {"avoid_negative_ts": "disabled"}
    cut = copy_packets(whole, tmp_path / "cut.mp4", lambda i, t: t - 8 / 20, options=options)
    assert probe(cut).frames == 72 and len(frame_times(cut)) == 72
    assert shades(cut) == list(range(8, 80))
    for start in (0, 1, 11, 12, 13, 50, 71):
        assert shades(cut, start, min(start + 2, 72)) == list(range(start + 8, min(start + 10, 80)))
    with pytest.raises(ValueError, match="72 of 73 frames"):
        shades(cut, 70, 73)


def test_frames_behind_the_end_of_an_edit_list_do_not_count(tmp_path):
    path = write_foreign(tmp_path / "a.mp4", numbered_frames(80))
    data = bytearray(path.read_bytes())
    at = data.find(b"elst") + 12  # how long its one edit lasts
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") // 2).to_bytes(4, "big")
    path.write_bytes(data)
    assert probe(path).frames == len(frame_times(path)) == 40
    assert shades(path) == list(range(40)) and shades(path, 30, 32) == [30, 31]


@pytest.mark.parametrize(
    ("degrees", "mirror", "shown"),
    [
        (90, {}, ("bottom left", "top left")),  # counter-clockwise
        (180, {}, ("bottom right", "bottom left")),
        (270, {}, ("top right", "bottom right")),
        (0, {"hflip": True}, ("top right", "top left")),
        (0, {"vflip": True}, ("bottom left", "bottom right")),
    ],
)
def test_a_video_is_turned_and_mirrored_as_a_player_shows_it(degrees, mirror, shown, tmp_path):
    path = write_foreign(
        tmp_path / "a.mp4", corner_frames(), lambda stream: stream.set_display_rotation(degrees, **mirror)
    )
    pictures, info = list(read_frames(path)), probe(path)
    assert {bright_corner(picture) for picture in pictures} == {shown}
    assert pictures[0].shape == ((96, 64, 3) if degrees in (90, 270) else (64, 96, 3))
    assert (info.height, info.width) == pictures[0].shape[:2] and ("turned" in info.changes)


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    wide = {"sample_aspect_ratio": Fraction(4, 3)}
    path = write_foreign(tmp_path / "a.mp4", corner_frames(), lambda stream: tag(stream, wide))
    assert next(read_frames(path)).shape == (64, 128, 3) and probe(path).width == 128
    assert probe(path).changes == "stretched (pixels are 1.33 times as wide as high)"


def test_what_the_container_crops_is_cut_off(tmp_path):
    path = write_foreign(tmp_path / "a.mp4", corner_frames())
    # mp4's clean aperture: the right two thirds (64 px, 16 px right of the centre), the upper three quarters.
    add_box(path, struct.pack(">I4s8i", 40, b"clap", 64, 1, 48, 1, 16, 1, -8, 1))
    for copy in (path, copy_packets(path, tmp_path / "a.mkv")):  # Matroska says it in its own way
        picture = next(read_frames(copy))
        info = probe(copy)
        assert picture.shape == (info.height, info.width, 3) == (48, 64, 3) and info.changes == "cropped"
        np.testing.assert_allclose(picture[8, [4, 60]].mean(axis=-1), [CORNER[0], 20], atol=6)


RED = (220, 30, 30)


def tag(stream, tags):
    for name, value in tags.items():
        setattr(stream.codec_context, name, value)


def write_red(path: Path, matrix: int, wide: int, tagged: bool = True, size=(64, 96), **how: Any) -> Path:
    """Red pictures whose YUV is that of a matrix and range, and which say so if `tagged`; `how` is for the writer."""
    tags = {"colorspace": matrix, "color_range": wide} if tagged else {}

    def change(frame):
        changed = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=wide)
        changed.colorspace, changed.color_range = (matrix, wide) if tagged else (2, 0)
        return changed

    frames = [np.full((*size, 3), RED, np.uint8)] * 3
    return write_foreign(path, frames, lambda stream: tag(stream, tags | how), change=change)


@pytest.mark.parametrize(
    ("size", "matrix", "wide", "tagged"),
    [*(((64, 96), matrix, wide, True) for matrix in (1, 5, 9) for wide in (1, 2)),
     ((64, 96), 5, 1, False), ((720, 1280), 1, 1, False)],  # untagged ones are taken as players take them
)  # fmt: skip
def test_the_colour_matrix_and_range_are_those_that_a_video_says_or_players_assume(
    size, matrix, wide, tagged, tmp_path
):
    path = write_red(tmp_path / "a.mp4", matrix, wide, tagged, size)
    np.testing.assert_allclose(next(read_frames(path))[30, 40], RED, atol=4)


@pytest.mark.parametrize(
    ("tags", "named"),
    [
        ({"color_trc": 16, "color_primaries": 9}, "PQ, high dynamic range"),
        ({"color_trc": 18, "color_primaries": 9}, "HLG, high dynamic range"),
        ({"color_trc": 8}, "transfer characteristic 8"),
        ({"colorspace": 10}, "colour matrix 10"),
        ({"sample_aspect_ratio": Fraction(1, 60)}, "0.0167 times as wide as high"),
        ({"options": H264 | {"x264-params": "tff=1"}}, "interlaced"),
        ("rotated", "turned by -45 degrees"),
    ],
)
def test_what_cannot_be_shown_as_a_player_does_is_refused_by_name(tags, named, tmp_path):
    path = tmp_path / "a.mp4"
    if tags == "rotated":
        write_foreign(path, corner_frames(), lambda stream: stream.set_display_rotation(45))
    else:
        write_red(path, 9, 1, **tags)
    for read in (probe, lambda path: list(read_frames(path))):
        with pytest.raises(ValueError, match=f"a.mp4: .*{named}") as error:
            read(path)
        assert "\n" not in str(error.value)


def write_streams(path: Path, *streams: tuple[str, int, list[np.ndarray]]) -> Path:
    """A video stream for each codec, disposition, and frames (h w c) uint8."""
    with av.open(str(path), "w") as container:
        made: list[Any] = [container.add_stream(codec, rate=20) for codec, _, _ in streams]
        for stream, (codec, disposition, frames) in zip(made, streams, strict=True):
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt, stream.max_b_frames = {"libx264": "yuv420p", "png": "rgba"}[codec], 0
            stream.disposition = disposition
        for stream, (_, _, frames) in zip(made, streams, strict=True):
            for frame in frames:
                container.mux(stream.encode(VideoFrame.from_ndarray(frame, "rgba" if frame.shape[2] == 4 else "rgb24")))
            container.mux(stream.encode())
    return path


def test_transparent_pixels_of_a_video_are_refused_and_opaque_ones_read(tmp_path):
    for name, alpha in (("opaque", 255), ("clear", 100)):
        write_streams(tmp_path / f"{name}.mov", ("png", 0, [np.full((64, 96, 4), (*RED, alpha), np.uint8)]))
    assert next(read_frames(tmp_path / "opaque.mov"))[5, 5].tolist() == list(RED)
    with pytest.raises(ValueError, match="transparent pixels"):
        probe(tmp_path / "clear.mov")


def test_of_several_videos_the_default_is_read_or_they_are_refused(tmp_path):
    dark, bright = ([np.full((64, 96, 3), shade, np.uint8)] * 3 for shade in (20, 220))
    path = write_streams(tmp_path / "a.mkv", ("libx264", 0, dark[:2]), ("libx264", 1, bright))
    assert [round(float(frame.mean()), -1) for frame in read_frames(path)] == [220] * 3 and probe(path).frames == 3
    with pytest.raises(ValueError, match="holds 2 videos, 0 of them the default"):
        probe(write_streams(tmp_path / "b.mkv", ("libx264", 0, dark), ("libx264", 0, dark)))


def test_a_cover_is_no_video(tmp_path):
    cover, frames = [np.zeros((32, 32, 4), np.uint8)], [np.zeros((64, 96, 3), np.uint8)]
    path = write_streams(tmp_path / "a.mp4", ("png", Disposition.attached_pic, cover), ("libx264", 0, frames))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert probe(path).frames == 1 and probe(path).height == 64


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile other.mp4\n",
        "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\n",
    ],
)
def test_a_text_that_names_another_video_is_no_video(text, tmp_path):
    write_foreign(tmp_path / "other.mp4", corner_frames())
    (tmp_path / "video.mp4").write_text(text)
    for read in (probe, frame_times, lambda path: list(read_frames(path))):
        with pytest.raises(ValueError, match=r"video.mp4 .* or no video"):
            read(tmp_path / "video.mp4")


@pytest.mark.parametrize("name", ["concat:a.mp4", os.fsdecode(b"\xff.mp4")])
def test_a_name_that_looks_like_a_protocol_or_is_no_utf8_is_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(name, np.zeros((3, 32, 48, 3), np.uint8), 10)
    assert probe(name).frames == len(list(read_frames(name))) == 3


def test_every_altered_byte_of_our_own_pictures_is_seen(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(30), 20.0)
    data = (tmp_path / "a.mp4").read_bytes()
    first = data.find(b"mdat") + 4
    rng = np.random.default_rng(0)
    for at in rng.integers(first, len(data) - 60, 10):
        (tmp_path / "a.mp4").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        for read in (frame_times, lambda path: list(read_frames(path, 4, 5))):
            with pytest.raises(ValueError, match=r"a.mp4 is damaged"):
                read(tmp_path / "a.mp4")


def test_damage_that_the_decoder_sees_is_refused_and_so_is_what_was_made_from_it(tmp_path):
    rng = np.random.default_rng(1)
    wall = rng.integers(0, 256, (64, 160, 3), dtype=np.uint8)
    walk = [np.ascontiguousarray(wall[:, i : i + 96]) for i in range(30)]  # key frames are 0 and 20
    path = write_foreign(tmp_path / "a.mp4", walk, options={"x264-params": "cabac=0:bframes=0:threads=1"})
    data = path.read_bytes()
    first, end = data.find(b"mdat") + 4, data.find(b"moov") - 44
    refused = 0
    for at in rng.integers(first, end, 20).tolist():
        noise = rng.integers(0, 256, 40, dtype=np.uint8).tobytes()
        path.write_bytes(data[:at] + noise + data[at + 40 :])
        try:
            list(read_frames(path))
        except ValueError as error:
            number = re.search(r"a.mp4 is damaged or truncated in or before its frame (\d+)", str(error))
            assert number is not None, error
            refused, last = refused + 1, 19 if int(number[1]) < 20 else 29  # before the next key frame
            with pytest.raises(ValueError, match=r"a.mp4 is damaged or truncated"):
                list(read_frames(path, last, last + 1))
    assert refused > 12


def test_our_own_videos_say_what_their_colours_are_and_begin_with_their_table(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, [np.full((64, 96, 3), RED, np.uint8)] * 3, 20.0)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data == (tmp_path / "b.mp4").read_bytes() and 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context  # as the container says it, before anything is decoded
        for tagged in (context, next(container.decode(video=0))):
            assert (tagged.colorspace, tagged.color_primaries, tagged.color_trc, tagged.color_range) == (1, 1, 1, 1)
    np.testing.assert_allclose(next(read_frames(tmp_path / "a.mp4"))[30, 40], RED, atol=4)


def test_a_long_thin_picture_is_cut_before_it_is_resized():
    thin = np.zeros((1, 60000, 3), np.uint8)
    thin[:, 29990:30010] = 255
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fit_frame(thin, 96, 160).min() > 200 and fit_frame(thin.transpose(1, 0, 2), 96, 160).shape == (96, 160, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
