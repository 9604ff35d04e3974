"""Picture files, read as a viewer shows them."""

import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from configs import storage
from configs.errors import UserError
from configs.foreign import DAMAGE

# Of the others that Pillow knows, some start programs (EPS), some are no single picture (PDF).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS = 100_000_000  # 300 MB; what says that it has more is a decompression bomb


def read_picture(path: str | Path) -> np.ndarray:
    """(h w 3) uint8 RGB, as a viewer shows it.

    Turned as its Exif data say, colours as its profile says, 16 bits scaled to 8, transparent pixels on white; of an
    animation the first frame, with a note. Refused if it is damaged, none of `FORMATS`, or larger than `MOST_PIXELS`.
    """
    return decode_picture(storage.read_bytes(path), path)


def decode_picture(data: bytes, path: str | Path) -> np.ndarray:
    """As `read_picture`, of a file's bytes; `path` names it."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it says of a damaged file is in the error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit is below
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise UserError(f"{picture.width}x{picture.height} px are more than {MOST_PIXELS:,}")
                if getattr(picture, "n_frames", 1) > 1:  # only formats that can have several say it
                    tqdm.write(f"{path} holds several pictures; the first one is taken", file=sys.stderr)
                return np.array(_to_rgb(ImageOps.exif_transpose(picture)))
    except (*DAMAGE, OSError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its message names an object in memory
        fault = "no known format" if unknown else " ".join(str(error).split())[:200] or type(error).__name__
        expected = f"it is truncated, too large or none of {', '.join(FORMATS)}"
        raise UserError(f"cannot read the picture {path} ({fault}); {expected}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # Pillow would cut off above 255
        values = np.asarray(picture).astype(np.int64)
        if not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise UserError("its grey values are no 16 bits")
        return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise UserError("its grey values are no whole numbers")
    profile = picture.info.get("icc_profile")
    if picture.mode == "CMYK":
        return _to_srgb(picture, profile) or picture.convert("RGB")
    if picture.has_transparency_data:
        pixels = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    shown = picture.convert("RGB")
    return _to_srgb(shown, profile) or shown


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image | None:
    """The picture in the colours of a screen; none if its profile is theirs already, of other channels or damaged."""
    if not profile:
        return None
    try:
        own: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own) or own.profile.xcolor_space.strip() != picture.mode:
            return None
        return ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
