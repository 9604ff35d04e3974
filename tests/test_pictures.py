"""Picture files are read as a viewer shows them, or refused in one line."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_world import GAME

from data_pipeline.pictures import MOST_PIXELS, read_picture
from data_pipeline.readers.frames import read_pictures
from sampling.generate import read_prompt

RED = (220, 30, 30)


def corner(height: int = 8, width: int = 12) -> Image.Image:
    """Black, with a red top left corner."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    return Image.fromarray(pixels)


LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}


@pytest.mark.parametrize(
    ("orientation", "corner_at"),
    [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)), (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0))],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_a_picture_is_turned_as_its_exif_data_say(orientation, corner_at, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner().save(tmp_path / f"a.{suffix}", exif=exif, **LOSSLESS.get(suffix, {}))
    pixels = read_picture(tmp_path / f"a.{suffix}")
    assert pixels.shape == ((12, 8, 3) if orientation > 4 else (8, 12, 3))
    np.testing.assert_allclose(pixels[corner_at], RED, atol=8)


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        np.testing.assert_array_equal(read_picture(tmp_path / name)[..., 1], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_white_and_half_transparent_ones_half(mode, tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    name = "a.tiff" if mode == "PA" else "a.png"
    Image.fromarray(pixels).convert(mode).save(tmp_path / name)
    np.testing.assert_allclose(read_picture(tmp_path / name)[0, :, 0], [255, 127, 0], atol=1)


def test_a_palette_and_its_transparent_colour_are_shown(tmp_path):
    picture = corner().quantize(4)
    picture.save(tmp_path / "a.gif")
    np.testing.assert_allclose(read_picture(tmp_path / "a.gif")[0, 0], RED, atol=2)
    picture.save(tmp_path / "b.png", transparency=picture.getpixel((0, 0)))
    assert read_picture(tmp_path / "b.png")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "ink", "suffix", "shown"),
    [
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("1", 0, "png", (0, 0, 0)),
        ("L", 77, "tiff", (77, 77, 77)),
        ("YCbCr", (76, 85, 255), "jpg", (254, 0, 0)),
    ],
)
def test_other_channels_become_red_green_and_blue(mode, ink, suffix, shown, tmp_path):
    Image.new(mode, (8, 8), ink).save(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(read_picture(tmp_path / f"a.{suffix}")[4, 4], shown, atol=3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(suffix, tmp_path, capsys):
    others = [Image.new("RGB", (12, 8), shade) for shade in ("blue", "green")]
    corner().save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    np.testing.assert_allclose(read_picture(tmp_path / f"a.{suffix}")[0, 0], RED, atol=8)
    assert capsys.readouterr().err == f"{tmp_path}/a.{suffix} holds several pictures; the first one is taken\n"


def test_other_formats_and_damaged_files_are_refused_in_one_line(tmp_path):
    corner().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    corner().save(tmp_path / "pixels.ppm")
    bad = {
        "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "text": b"hello",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "altered": whole[:50] + b"\0\1\2\3" + whole[54:],
        "others": (tmp_path / "pixels.ppm").read_bytes(),
    }
    for name, data in bad.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        with pytest.raises(ValueError, match=f"cannot read the picture .*{name}.png") as error:
            read_picture(tmp_path / f"{name}.png")
        assert "\n" not in str(error.value)


def png_that_says(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(100))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 14_000, 60_000])
def test_a_decompression_bomb_is_one_line(side, tmp_path, recwarn):
    assert side * side > MOST_PIXELS
    (tmp_path / "a.png").write_bytes(png_that_says(side, side))
    with pytest.raises(ValueError, match=r"cannot read the picture .*a.png"):
        read_picture(tmp_path / "a.png")
    assert not recwarn.list


def test_prompts_and_pictures_of_recordings_are_read_alike(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = corner(GAME.width, GAME.height)
    turned.save(tmp_path / "a.png", exif=exif)
    (frame,) = read_pictures([tmp_path / "a.png"], (GAME.height, GAME.width), 0, 1)
    np.testing.assert_array_equal(read_prompt(str(tmp_path / "a.png"), 0, GAME)[0], frame)
