"""A rollout on one page: labelled pictures in a grid, as a PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configs.files import atomic_path

PAPER, INK, FAINT = (18, 20, 26), (238, 238, 242), (150, 154, 166)
TILE_WIDTH = 400  # px of one picture
GAP = 14  # px between pictures
CORNER = 8  # px radius
SMOOTH = 4  # the corner mask is drawn this much larger and averaged down


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet with what stands under it."""

    picture: np.ndarray  # (h w 3) uint8
    label: str
    remark: str = ""  # fainter, at the right


def draw_sheet(tiles: Sequence[Tile], title: str, columns: int = 3) -> Image.Image:
    """The `tiles` row by row, all of the first one's shape, under a title."""
    if not tiles:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height = round(TILE_WIDTH * tiles[0].picture.shape[0] / tiles[0].picture.shape[1])
    title_px, label_px = 40, 26
    size = (
        columns * (TILE_WIDTH + GAP) + GAP,
        title_px + GAP + rows * (height + label_px + GAP),
    )
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP + title_px / 2), title, font=_font(18), fill=INK, anchor="lm")
    mask = _rounded(TILE_WIDTH, height)
    for i, tile in enumerate(tiles):
        left = GAP + (i % columns) * (TILE_WIDTH + GAP)
        top = title_px + GAP + (i // columns) * (height + label_px + GAP)
        picture = Image.fromarray(tile.picture).resize((TILE_WIDTH, height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top), mask)
        middle = top + height + label_px / 2
        pen.text((left + 2, middle), tile.label, font=_font(13), fill=INK, anchor="lm")
        pen.text((left + TILE_WIDTH - 2, middle), tile.remark, font=_font(13), fill=FAINT, anchor="rm")
    return sheet


def write_sheet(path: Path, tiles: Sequence[Tile], title: str, columns: int = 3) -> None:
    """Writes the sheet as a PNG, atomically."""
    sheet = draw_sheet(tiles, title, columns)
    with atomic_path(path) as part:
        sheet.save(part)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _rounded(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width * SMOOTH, height * SMOOTH), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), CORNER * SMOOTH, fill=255)
    return mask.resize((width, height), Image.Resampling.BOX)
