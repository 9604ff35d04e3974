"""Rollouts to look at: labelled pictures in a grid, as a contact sheet (PNG) or as a video."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from configs import storage
from configs.game import GameConfig
from data_pipeline.overlay import Overlay, enlarge
from data_pipeline.types import Actions
from data_pipeline.video import write_video
from model.layout import CHUNK_FRAMES

PAPER, INK, FAINT = (18, 20, 26), (238, 238, 242), (150, 154, 166)
TILE_WIDTH = 400  # px of a picture by default
HELD_WIDTH = 320  # px of a picture of a grid's contact sheet, or of its video with four columns
TITLE_HEIGHT, LABEL_HEIGHT, GAP = 40, 26, 14  # px; the gap is between pictures
overlay_of = lru_cache(maxsize=4)(Overlay)


@dataclass(frozen=True)
class Tile:
    """A picture and the text under it."""

    picture: np.ndarray  # (h w 3) uint8
    label: str
    remark: str = ""  # fainter, at the right


@dataclass(frozen=True)
class Panel:
    """One rollout or recording with its actions."""

    label: str
    frames: np.ndarray  # (n h w 3) uint8
    actions: Actions  # n rows


@dataclass(frozen=True)
class VideoGrid:
    """Panels that run at the same time."""

    name: str  # of the files, without suffix
    title: str
    sentence: str  # what it shows
    panels: Sequence[Panel]
    columns: int
    width: int  # px of one picture of the video


def write_grid(out: Path, grid: VideoGrid, game: GameConfig) -> None:
    """Writes `<name>.mp4` and `<name>.png`, a row per panel with one picture per chunk, into `out`."""
    write_film(out / f"{grid.name}.mp4", grid, game)
    last_frames = range(CHUNK_FRAMES - 1, len(grid.panels[0].frames), CHUNK_FRAMES)
    write_frames(out / f"{grid.name}.png", grid.panels, last_frames, grid.title, game)


def write_film(path: Path, grid: VideoGrid, game: GameConfig) -> None:
    """Writes the panels as a video in which they run at the same time."""
    sheets = (
        draw_sheet([_tile(panel, i, grid.width, game) for panel in grid.panels], grid.title, grid.columns, grid.width)
        for i in tqdm(range(len(grid.panels[0].frames)), desc=f"video {grid.name}", unit="frame", disable=None)
    )
    write_video(path, map(np.asarray, sheets), game.fps, crf=20)


def write_frames(path: Path, panels: Sequence[Panel], frames: Sequence[int], title: str, game: GameConfig) -> None:
    """Writes a contact sheet as a PNG: a row per panel, its `frames`; of a shorter one the last."""
    tiles = [_tile(panel, min(i, len(panel.frames) - 1), HELD_WIDTH, game) for panel in panels for i in frames]
    write_sheet(path, tiles, title, len(frames), HELD_WIDTH)


def _tile(panel: Panel, frame: int, width: int, game: GameConfig) -> Tile:
    """Frame number `frame` of a panel, with its keys and mouse."""
    picture = enlarge(panel.frames[frame], width)
    overlay = overlay_of(game.action_space, *picture.shape[:2])
    drawn = overlay.draw(picture, panel.actions.keyboard[frame], panel.actions.mouse[frame])
    return Tile(drawn, panel.label, f"frame {frame}, {frame / game.fps:.1f} s" if frame else "the first frame")


def draw_sheet(tiles: Sequence[Tile], title: str, columns: int = 3, width: int = TILE_WIDTH) -> Image.Image:
    """The `tiles` row by row, `width` px each and all of the first one's shape, under a title; even in size."""
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
    with storage.writing(path) as part:
        draw_sheet(tiles, title, columns, width).save(part)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
