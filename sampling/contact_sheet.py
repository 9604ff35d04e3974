"""A contact sheet: labelled pictures in a grid, as a PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configs import storage
from configs.errors import UserError

PAPER, INK, FAINT = (18, 20, 26), (238, 238, 242), (150, 154, 166)
TILE_WIDTH = 400  # px of one picture, unless another is asked for
TITLE_HEIGHT, LABEL_HEIGHT = 40, 26  # px
GAP = 14  # px between pictures


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet with what stands under it."""

    picture: np.ndarray  # (h w 3) uint8
    label: str
    remark: str = ""  # fainter, at the right


def draw_sheet(tiles: Sequence[Tile], title: str, columns: int = 3, width: int = TILE_WIDTH) -> Image.Image:
    """The `tiles` row by row, `width` px each and all of the first one's shape, under a title; even in size."""
    if not tiles:
        raise UserError("a contact sheet needs at least one picture")
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height = round(width * tiles[0].picture.shape[0] / tiles[0].picture.shape[1])
    size = (columns * (width + GAP) + GAP, TITLE_HEIGHT + GAP + rows * (height + LABEL_HEIGHT + GAP))
    sheet = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), PAPER)  # H.264 wants even sizes
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP + TITLE_HEIGHT / 2), title, font=_font(18), fill=INK, anchor="lm")
    for i, tile in enumerate(tiles):
        left = GAP + (i % columns) * (width + GAP)
        top = TITLE_HEIGHT + GAP + (i // columns) * (height + LABEL_HEIGHT + GAP)
        picture = Image.fromarray(tile.picture)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top))
        middle = top + height + LABEL_HEIGHT / 2
        pen.text((left + 2, middle), tile.label, font=_font(13), fill=INK, anchor="lm")
        pen.text((left + width - 2, middle), tile.remark, font=_font(13), fill=FAINT, anchor="rm")
    return sheet


def write_sheet(path: Path, tiles: Sequence[Tile], title: str, columns: int = 3, width: int = TILE_WIDTH) -> None:
    """Writes the sheet as a PNG, atomically."""
    sheet = draw_sheet(tiles, title, columns, width)
    with storage.writing(path) as part:
        sheet.save(part)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
