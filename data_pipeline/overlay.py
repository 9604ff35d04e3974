"""What was pressed, drawn onto the picture: keys bottom-left, the mouse's motion on a dial bottom-right."""

import math

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from configs.game import ActionSpace
from data_pipeline.types import Actions

MIN_WIDTH = 640  # px; smaller pictures are enlarged before anything is drawn, so that the letters stay sharp
SUPERSAMPLING = 4  # sprites are drawn so many times larger and averaged down, for smooth edges
CROSS = {"W": (0, 1), "A": (1, 0), "S": (1, 1), "D": (1, 2)}  # (row, column) of the four keys that belong together

WHITE, INK, DARK, AMBER = (250, 250, 252), (22, 24, 30), (14, 16, 22), (255, 190, 50)
GLASS, RIM, SHADOW = (*DARK, 140), (*WHITE, 150), (*INK, 90)  # with alpha, of 255
HALF_DIAL_DEG = 2.5  # degrees per frame at which the mouse vector is about half of the dial's radius long
SUBPIXEL_BITS, SUBPIXELS = 4, 16  # of OpenCV's coordinates


def active_keys(action_space: ActionSpace, actions: Actions) -> dict[str, np.ndarray]:
    """For the label of each key that is drawn whether it is held (n), in the order of the keys; `""` is not drawn.

    Where W is a key and neither A nor D is, and there is a mouse, the two show its yaw: it steers, as in gta_drive.
    """
    labels = action_space.caps or action_space.keys
    active = {label: actions.keyboard[:, i] > 0.5 for i, label in enumerate(labels) if label}
    if "W" in active and not {"A", "D"} & active.keys() and action_space.mouse:
        active |= {"A": actions.mouse[:, 1] < 0, "D": actions.mouse[:, 1] > 0}
    return active


Box = tuple[float, float, float, float]  # left, top, right, bottom, px
Sprite = tuple[Image.Image, tuple[int, int]]  # a small RGBA picture, and where its top left corner is on the frame


class Overlay:
    """Draws one action space's keys and mouse onto frames of one size."""

    def __init__(self, action_space: ActionSpace, height: int, width: int) -> None:
        self.action_space = action_space
        key_px = max(12, round(0.092 * min(height, 0.6 * width)))
        margin = round(0.55 * key_px)
        nothing = Actions(np.zeros((1, len(action_space.keys))), np.zeros((1, 2)))
        labels = [label.replace("_", " ").capitalize() for label in active_keys(action_space, nothing)]
        self.radius = 1.08 * key_px
        self.centre = x, y = (width - margin - self.radius, height - margin - self.radius)  # px
        right = x - self.radius - margin if action_space.mouse else width - margin
        boxes = key_boxes(labels, key_px, height - margin, margin, right)
        self.keys = [
            (_draw_sprite(box, 0.22, label), _draw_sprite(box, 0.22, label, active=True))  # dark, lit
            for label, box in zip(labels, boxes, strict=True)
        ]
        self.dial = _draw_sprite((x - self.radius, y - self.radius, x + self.radius, y + self.radius), 0.5)

    def draw(self, frame: np.ndarray, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        """A copy of `frame` (h w 3) uint8 with the held keys of `keyboard` (k) lit and the vector of `mouse` (2)."""
        active = active_keys(self.action_space, Actions(keyboard[None], mouse[None]))
        sprites = [lit if held[0] else dark for (dark, lit), held in zip(self.keys, active.values(), strict=True)]
        picture = Image.fromarray(frame)
        for image, corner in [*sprites, self.dial] if self.action_space.mouse else sprites:
            picture.paste(image, corner, image)
        drawn = np.array(picture)
        if self.action_space.mouse:
            pitch_deg, yaw_deg = mouse * self.action_space.mouse_unit_deg
            _draw_vector(drawn, self.centre, self.radius, (yaw_deg, -pitch_deg))
        return drawn


def enlarge(frame: np.ndarray, min_width: int = MIN_WIDTH) -> np.ndarray:
    """`frame` (h w 3) uint8 enlarged by a whole factor (cubic) to about `min_width` px; larger ones as they are."""
    factor = max(1, round(min_width / frame.shape[1]))
    return frame if factor == 1 else cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)


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
            boxes.append((start, top, start + key_px, top + key_px))
            continue
        width = max(key_px, _font(key_px, label).getlength(label) + 0.6 * key_px)
        if row_left > row_start and row_left + width > right:
            row_bottom, row_left = row_bottom - pitch, row_start
        boxes.append((row_left, row_bottom - key_px, row_left + width, row_bottom))
        row_left += width + 0.15 * key_px
    return boxes


def _draw_vector(
    frame: np.ndarray, centre: tuple[float, float], radius: float, right_down_deg: tuple[float, float]
) -> None:
    """Draws the mouse's motion onto `frame` as an amber line with a knob; a white knob in the middle when it rests.

    The length saturates smoothly, so that slow and fast turns of any game can be told apart within the dial.
    """
    speed = math.hypot(*right_down_deg)  # degrees per frame
    length = 0.78 * radius * math.tanh(speed / (2 * HALF_DIAL_DEG) * math.log(3))  # tanh(log(3) / 2) = 1/2
    tip = [c + (length * part / speed if speed else 0) for c, part in zip(centre, right_down_deg, strict=True)]
    # OpenCV counts from the middle of a pixel, and takes fractions of one as whole numbers.
    start, end = ([round((c - 0.5) * SUBPIXELS) for c in point] for point in (centre, tip))
    colour, thickness = AMBER if length > 1 else WHITE, max(1, round(0.1 * radius))
    cv2.line(frame, start, end, colour, thickness, cv2.LINE_AA, SUBPIXEL_BITS)
    cv2.circle(frame, end, round(0.17 * radius * SUBPIXELS), colour, cv2.FILLED, cv2.LINE_AA, SUBPIXEL_BITS)


def _font(key_px: float, label: str) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=key_px * (0.56 if len(label) == 1 else 0.4))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType draws no letters of a given size"
    return font


def _draw_sprite(box: Box, rounding: float, label: str = "", active: bool = False) -> Sprite:
    """Dark glass with a white rim above a shadow, or white with dark letters if `active`.

    `rounding` is a share of the height; 0.5 is a circle.
    """
    pad = math.ceil(0.25 * (box[3] - box[1]))
    x, y = math.floor(box[0]) - pad, math.floor(box[1]) - pad
    size = SUPERSAMPLING * (math.ceil(box[2]) + pad - x), SUPERSAMPLING * (math.ceil(box[3]) + pad - y)
    left, top, right, bottom = (SUPERSAMPLING * (edge - start) for edge, start in zip(box, (x, y, x, y), strict=True))
    height, canvas = bottom - top, Image.new("RGBA", size, (*INK, 0))
    shadow = [left, top + 0.013 * height, right, bottom + 0.06 * height]
    ImageDraw.Draw(canvas).rounded_rectangle(shadow, rounding * height, fill=SHADOW)
    canvas = canvas.filter(ImageFilter.GaussianBlur(0.05 * height))
    fill, rim, ink = ((*WHITE, 255), None, (*INK, 255)) if active else (GLASS, RIM, (*WHITE, 235))
    pen, width = ImageDraw.Draw(canvas), max(1, round(0.03 * height))
    pen.rounded_rectangle([left, top, right, bottom], rounding * height, fill=fill, outline=rim, width=width)
    font = _font(height, label)
    ascent = font.getbbox("H", anchor="ls")[1]  # centred on the capitals, so that "Q" does not sit higher than "W"
    pen.text(((left + right) / 2, (top + bottom - ascent) / 2), label, font=font, fill=ink, anchor="ms")
    return canvas.reduce(SUPERSAMPLING), (x, y)
