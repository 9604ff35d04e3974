"""Picture files, read as a viewer shows them."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_pipeline import storage

# Others that Pillow knows start programs (EPS) or are no single picture (PDF, MPO).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MOST_PIXELS = 100_000_000  # 300 MB; what says more is a decompression bomb
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, EOFError)


def read_picture(path: str | Path) -> np.ndarray:
    """(h w 3) uint8 RGB, as a viewer shows it.

    Turned as its EXIF data say, 16 bits scaled to 8, transparent pixels on white, of an animation the first frame.
    Raises ValueError in one line for a file that is damaged, none of `FORMATS`, or larger than `MOST_PIXELS`.
    """
    data = storage.read_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large picture: the limit is below
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} px are more than {MOST_PIXELS:,}")
                return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except (*DAMAGE, Image.DecompressionBombError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        formats = ", ".join(FORMATS)
        raise ValueError(
            f"cannot read the picture {path} ({said}); it is truncated, too large or no picture of {formats}"
        ) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # Pillow would cut off above 255
        values = np.asarray(picture).astype(np.int64)
        if not 0 <= values.min() <= values.max() <= 0xFFFF:
            raise ValueError("grey values beyond 16 bits")
        return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("grey values that are no whole numbers")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    pixels = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
