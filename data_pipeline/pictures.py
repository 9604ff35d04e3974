"""Picture files, read as a viewer shows them."""

import io
import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from configs import storage
from configs.errors import UserError, one_line
from configs.untrusted import DAMAGE

# Of the others that Pillow knows, some start programs (EPS), some are no single picture (PDF).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS = 100_000_000  # 300 MB; what says that it has more is a decompression bomb


def read_picture(path: str | Path) -> np.ndarray:
    """(h w 3) uint8 RGB, as a viewer shows it: turned as its Exif data say, in the colours of its profile, 16 bits
    scaled to 8, transparent pixels on white, the first frame of an animation. UserError if it is damaged or too large.
    """
    return decode_picture(storage.read_bytes(path), path)


def decode_picture(data: bytes, path: str | Path, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """As `read_picture`, of a file's bytes; `path` names it."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it says of a damaged file is in the error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit is below
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > most_pixels:
                    raise UserError(f"{picture.width}x{picture.height} px are more than {most_pixels:,}")
                if getattr(picture, "n_frames", 1) > 1:  # formats without animations have no such attribute
                    tqdm.write(f"{path} holds several pictures; the first one is taken", file=sys.stderr)
                return np.array(_to_rgb(ImageOps.exif_transpose(picture)))
    except (*DAMAGE, OSError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its message names an object in memory
        fault = "no known format" if unknown else one_line(error)[:200]
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
    data = picture.info.get("icc_profile")
    if picture.has_transparency_data:
        pixels = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    shown = picture if picture.mode == "CMYK" else picture.convert("RGB")
    with suppress(ImageCms.PyCMSError, OSError):  # a damaged profile
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(data)) if data else None
        known = not data or "sRGB" in ImageCms.getProfileDescription(profile)
        if not known and profile.profile.xcolor_space.strip() == shown.mode:
            shown = ImageCms.profileToProfile(shown, profile, ImageCms.createProfile("sRGB"), outputMode="RGB") or shown
    return shown.convert("RGB")
