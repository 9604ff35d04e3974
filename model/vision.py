"""Images on their way into the model."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def preprocess_image(image: Image.Image, height: int, width: int) -> Tensor:
    """The image as (3 h w) float32 in [-1, 1]: centre crop to the aspect of `height` x `width` px, then resized.

    PIL's antialiased bilinear resize, and its rounding of a crop box that falls between pixels, as upstream.
    """
    image = image.convert("RGB")
    w, h = image.size
    if h / w > height / width:
        kept_w, kept_h = w, int(w * height / width)
    else:
        kept_w, kept_h = int(h * width / height), h
    if kept_w < 1 or kept_h < 1:
        raise ValueError(f"an image of {w}x{h} px has no {width}:{height} part; give one nearer to that shape")
    image = image.crop(((w - kept_w) / 2, (h - kept_h) / 2, (w + kept_w) / 2, (h + kept_h) / 2))  # pyright: ignore[reportArgumentType]
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return rearrange(pixels, "h w c -> c h w") * 2 - 1
