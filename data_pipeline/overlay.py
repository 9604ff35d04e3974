"""What was pressed, drawn onto the picture: keys bottom-left, the mouse's motion on a dial bottom-right."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from configs.errors import UserError
from configs.game import ActionSpace
from data_pipeline.types import Actions

MIN_WIDTH = 640  # px; smaller pictures are enlarged before anything is drawn, so that the letters stay sharp
SUPERSAMPLING = 4  # sprites are drawn this much larger and averaged down: smooth edges without a font file
CROSS = {"W": (0, 1), "A": (1, 0), "S": (1, 1), "D": (1, 2)}  # (row, column) of the four keys that belong together

WHITE, INK, DARK, AMBER = (250, 250, 252), (22, 24, 30), (14, 16, 22), (255, 190, 50)
GLASS, RIM, SHADOW, LINE = (*DARK, 140), (*WHITE, 150), (*INK, 90), (99, 101, 105, 167)  # with alpha, of 255
HALF_DIAL_DEG = 2.5  # degrees per frame at which the mouse vector is about half of the dial's radius long


def active_keys(action_space: ActionSpace, actions: Actions) -> dict[str, np.ndarray]:
    """For the label of each key that is drawn whether it is held (n), in the order of the keys; `""` is not drawn.

    Where W is a key and neither A nor D is, and there is a mouse, the two show its yaw: it steers, as in gta_drive.
    """
    labels = action_space.caps or action_space.keys
    active = {label: actions.keyboard[:, i] > 0.5 for i, label in enumerate(labels) if label}
    if "W" in active and not {"A", "D"} & active.keys() and action_space.mouse:
        active |= {"A": actions.mouse[:, 1] < 0, "D": actions.mouse[:, 1] > 0}
    return active


@dataclass(frozen=True)
class Sprite:
    """A small picture with an alpha channel and its place on the frame."""

    top: int  # px
    left: int  # px
    colour: np.ndarray  # (h w 3) float32, already multiplied by alpha
    alpha: np.ndarray  # (h w 1) float32 in [0, 1]

    def blit(self, frame: np.ndarray) -> None:
        """Lays the sprite over `frame` (h w 3) uint8, in place; what sticks out is cut."""
        height, width = self.alpha.shape[:2]
        top, left = max(self.top, 0), max(self.left, 0)
        place = frame[top : self.top + height, left : self.left + width]
        rows = slice(top - self.top, top - self.top + place.shape[0])
        columns = slice(left - self.left, left - self.left + place.shape[1])
        place[:] = np.rint(self.colour[rows, columns] + (1 - self.alpha[rows, columns]) * place)


class Overlay:
    """Draws one action space's keys and mouse onto frames of one size."""

    def __init__(self, action_space: ActionSpace, height: int, width: int) -> None:
        self.action_space = action_space
        self.height, self.width = height, width
        key_px = max(12, round(0.092 * min(height, 0.6 * width)))
        margin = round(0.55 * key_px)
        nothing = Actions(np.zeros((1, len(action_space.keys))), np.zeros((1, 2)))
        labels = [label.replace("_", " ").capitalize() for label in active_keys(action_space, nothing)]
        self.radius = 1.08 * key_px
        self.centre = (height - margin - self.radius, width - margin - self.radius)  # (row, column), px
        dial_left = width - margin - 2 * self.radius if action_space.mouse else width
        boxes = key_boxes(labels, key_px, height - margin, margin, dial_left - margin)
        self.keys = [
            (key_sprite(label, box, False), key_sprite(label, box, True))
            for label, box in zip(labels, boxes, strict=True)
        ]
        self.dial = dial_sprite(self.centre, self.radius)

    def draw(self, frame: np.ndarray, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        """A copy of `frame` (h w 3) uint8 with the held keys of `keyboard` (k) lit and the vector of `mouse` (2)."""
        if frame.shape != (self.height, self.width, 3):
            raise UserError(f"the overlay is made for {self.height}x{self.width} px, the frame is {frame.shape}")
        drawn = frame.copy()
        active = active_keys(self.action_space, Actions(keyboard[None], mouse[None]))
        for (dark, bright), held in zip(self.keys, active.values(), strict=True):
            (bright if held[0] else dark).blit(drawn)
        if self.action_space.mouse:
            self.dial.blit(drawn)
            pitch_deg, yaw_deg = mouse * self.action_space.mouse_unit_deg
            vector_sprite(self.centre, self.radius, (-pitch_deg, yaw_deg)).blit(drawn)
        return drawn


def enlarge(frame: np.ndarray, min_width: int = MIN_WIDTH) -> np.ndarray:
    """`frame` (h w 3) uint8 enlarged by a whole factor (cubic) to about `min_width` px; larger ones as they are."""
    height, width = frame.shape[:2]
    factor = max(1, round(min_width / width))
    if factor == 1:
        return frame
    return cv2.resize(frame, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)


Box = tuple[float, float, float, float]  # top, left, bottom, right, px


def key_boxes(labels: list[str], key_px: int, bottom: float, left: float, right: float) -> list[Box]:
    """The box of each label: W over A S D where all four are there, the others in rows beside them, up to `right`."""
    pitch = 1.15 * key_px  # from one key to the next
    cross = CROSS if set(CROSS) <= set(labels) else {}
    row_start = left + (3 * pitch + 0.35 * key_px if cross else 0)
    row_bottom, row_left = bottom, row_start
    boxes = []
    for label in labels:
        if label in cross:
            row, column = cross[label]
            top, start = bottom - key_px - (1 - row) * pitch, left + column * pitch
            boxes.append((top, start, top + key_px, start + key_px))
            continue
        width = max(key_px, _font(key_px, label).getlength(label) + 0.6 * key_px)
        if row_left > row_start and row_left + width > right:
            row_bottom, row_left = row_bottom - pitch, row_start
        boxes.append((row_bottom - key_px, row_left, row_bottom, row_left + width))
        row_left += width + 0.15 * key_px
    return boxes


def key_sprite(label: str, box: Box, active: bool) -> Sprite:
    """One rounded key: white with a dark letter when `active`, else dark glass with a white rim and letter."""
    canvas, origin = _draw_glass(box, 0.22, active)
    top, left, bottom, right = (SUPERSAMPLING * (edge - start) for edge, start in zip(box, 2 * origin, strict=True))
    font = _font(bottom - top, label)
    ascent = font.getbbox("H", anchor="ls")[1]  # centred on the capitals, so that "Q" does not sit higher than "W"
    place = (left + right) / 2, (top + bottom - ascent) / 2
    ImageDraw.Draw(canvas).text(place, label, font=font, fill=(*INK, 255) if active else (*WHITE, 235), anchor="ms")
    return _average_down(canvas, origin)


def dial_sprite(centre: tuple[float, float], radius: float) -> Sprite:
    """The round glass under the mouse vector, with a thin cross."""
    canvas, origin = _draw_glass(_around(centre, radius), 0.5)
    row, column = (SUPERSAMPLING * (c - o) for c, o in zip(centre, origin, strict=True))
    arm, thin = 0.8 * radius * SUPERSAMPLING, max(1, round(0.022 * radius * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    pen.line([column - arm, row, column + arm, row], fill=LINE, width=thin)
    pen.line([column, row - arm, column, row + arm], fill=LINE, width=thin)
    return _average_down(canvas, origin)


def vector_sprite(centre: tuple[float, float], radius: float, down_right_deg: tuple[float, float]) -> Sprite:
    """The amber line of the mouse's motion and its knob; a white knob in the middle when the mouse rests.

    The length saturates smoothly, so that slow and fast turns of any game can be told apart within the dial.
    """
    speed = math.hypot(*down_right_deg)  # degrees per frame
    length = 0.78 * radius * math.tanh(speed / (2 * HALF_DIAL_DEG) * math.log(3))  # tanh(log(3) / 2) = 1/2
    down, right = (length * part / speed if speed else 0.0 for part in down_right_deg)
    # Every frame has its own: the coverage of a pixel is its distance to the edge, which is fast, and no canvas.
    top, left = (math.floor(c - radius) for c in centre)
    rows, columns = np.mgrid[0 : math.ceil(2 * radius) + 1, 0 : math.ceil(2 * radius) + 1].astype(np.float32)
    rows, columns = rows + top + 0.5 - centre[0], columns + left + 0.5 - centre[1]
    along = ((rows * down + columns * right) / max(length**2, 1e-9)).clip(0, 1)
    line = (0.065 * radius - np.hypot(rows - along * down, columns - along * right) + 0.5).clip(0, 1)
    knob = (0.17 * radius - np.hypot(rows - down, columns - right) + 0.5).clip(0, 1)
    alpha = np.maximum(line if length > 1 else 0 * line, knob)[..., None]
    return Sprite(top, left, np.array(AMBER if length > 1 else WHITE, np.float32) * alpha, alpha)


def _font(key_px: float, label: str) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=key_px * (0.56 if len(label) == 1 else 0.4))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType draws no letters of a given size"
    return font


def _around(centre: tuple[float, float], radius: float) -> Box:
    return centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius


def _canvas(box: Box) -> tuple[Image.Image, tuple[int, int]]:
    """A supersampled canvas for `box` with room around it, and its top left corner on the frame, px."""
    top, left, bottom, right = box
    pad = math.ceil(0.25 * (bottom - top))
    origin = math.floor(top) - pad, math.floor(left) - pad
    height, width = math.ceil(bottom) + pad - origin[0], math.ceil(right) + pad - origin[1]
    return Image.new("RGBA", (width * SUPERSAMPLING, height * SUPERSAMPLING), (*INK, 0)), origin


def _draw_glass(box: Box, corner: float, active: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """`_canvas` with dark glass with a white rim in `box`, or white if `active`, above a shadow.

    `corner` is its radius as a share of the box's height; 0.5 is a circle.
    """
    canvas, origin = _canvas(box)
    top, left, bottom, right = (SUPERSAMPLING * (edge - start) for edge, start in zip(box, 2 * origin, strict=True))
    height = bottom - top
    shadow = [left, top + 0.013 * height, right, bottom + 0.06 * height]
    ImageDraw.Draw(canvas).rounded_rectangle(shadow, corner * height, fill=SHADOW)
    canvas = canvas.filter(ImageFilter.GaussianBlur(0.05 * height))
    fill, rim = ((*WHITE, 255), None) if active else (GLASS, RIM)
    width = max(1, round(0.03 * height))
    pen = ImageDraw.Draw(canvas)
    pen.rounded_rectangle([left, top, right, bottom], corner * height, fill=fill, outline=rim, width=width)
    return canvas, origin


def _average_down(canvas: Image.Image, origin: tuple[int, int]) -> Sprite:
    """The sprite of a supersampled canvas whose top left corner is `origin`."""
    pixels = np.asarray(canvas, np.float32)
    alpha = pixels[..., 3:] / 255
    size = (canvas.width // SUPERSAMPLING, canvas.height // SUPERSAMPLING)
    small = cv2.resize(np.concatenate([pixels[..., :3] * alpha, alpha], axis=2), size, interpolation=cv2.INTER_AREA)
    return Sprite(*origin, small[..., :3], small[..., 3:])
