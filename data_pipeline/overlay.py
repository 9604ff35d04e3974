"""What was pressed, drawn onto the picture: key caps bottom-left, a round mouse gauge bottom-right."""

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
CROSS = {"W": (0, 1), "A": (1, 0), "S": (1, 1), "D": (1, 2)}  # (row, column) of the four caps that belong together

WHITE, INK, DARK, AMBER = (250, 250, 252), (22, 24, 30), (14, 16, 22), (255, 190, 50)
DARK_ALPHA, RIM_ALPHA, SHADOW_ALPHA = 140, 150, 90  # of 255
HALF_GAUGE_DEG = 2.5  # degrees per frame at which the stick reaches about half of the gauge's radius


def lit_caps(action_space: ActionSpace, actions: Actions) -> dict[str, np.ndarray]:
    """For each cap that an overlay draws whether it is lit (n), in the order of the keys; the cap `""` is not drawn.

    Where W is a key and neither A nor D is, and there is a mouse, the two show its yaw: it steers, as in gta_drive.
    """
    labels = action_space.caps or action_space.keys
    lit = {label: actions.keyboard[:, i] > 0.5 for i, label in enumerate(labels) if label}
    if "W" in lit and not {"A", "D"} & lit.keys() and action_space.mouse:
        lit |= {"A": actions.mouse[:, 1] < 0, "D": actions.mouse[:, 1] > 0}
    return lit


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
    """Draws one action space's keys and mouse onto frames of one size; every sprite is made once, here."""

    def __init__(self, action_space: ActionSpace, height: int, width: int) -> None:
        self.action_space = action_space
        self.height, self.width = height, width
        cap = max(12, round(0.092 * min(height, 0.6 * width)))  # px
        margin = round(0.55 * cap)
        nothing = Actions(np.zeros((1, len(action_space.keys))), np.zeros((1, 2)))
        labels = [cap_label(label) for label in lit_caps(action_space, nothing)]
        self.radius = 1.08 * cap
        self.centre = (height - margin - self.radius, width - margin - self.radius)  # (row, column), px
        gauge_left = width - margin - 2 * self.radius if action_space.mouse else width
        boxes = cap_boxes(labels, cap, height - margin, margin, gauge_left - margin)
        self.caps = [
            (cap_sprite(label, box, False), cap_sprite(label, box, True))
            for label, box in zip(labels, boxes, strict=True)
        ]
        self.gauge = gauge_sprite(self.centre, self.radius)

    def draw(self, frame: np.ndarray, keyboard: np.ndarray, mouse: np.ndarray) -> np.ndarray:
        """A copy of `frame` (h w 3) uint8 with the held keys of `keyboard` (k) lit and the stick at `mouse` (2)."""
        if frame.shape != (self.height, self.width, 3):
            raise UserError(f"the overlay is made for {self.height}x{self.width} px, the frame is {frame.shape}")
        drawn = frame.copy()
        lit = lit_caps(self.action_space, Actions(keyboard[None], mouse[None]))
        for (dark, bright), held in zip(self.caps, lit.values(), strict=True):
            (bright if held[0] else dark).blit(drawn)
        if self.action_space.mouse:
            self.gauge.blit(drawn)
            pitch_deg, yaw_deg = mouse * self.action_space.mouse_unit_deg
            stick_sprite(self.centre, self.radius, (-pitch_deg, yaw_deg)).blit(drawn)
        return drawn


def enlarge(frame: np.ndarray, min_width: int = MIN_WIDTH) -> np.ndarray:
    """`frame` (h w 3) uint8 enlarged by a whole factor (cubic) to about `min_width` px; larger ones as they are."""
    height, width = frame.shape[:2]
    factor = max(1, round(min_width / width))
    if factor == 1:
        return frame
    return cv2.resize(frame, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)


def cap_label(label: str) -> str:
    """What fits on a cap: single letters in capitals, words with their first letter in capitals."""
    return label.replace("_", " ").capitalize()


Box = tuple[float, float, float, float]  # top, left, bottom, right, px


def cap_boxes(labels: list[str], cap: int, bottom: float, left: float, right: float) -> list[Box]:
    """The box of each label: W over A S D where all four are there, the others in rows beside them, up to `right`."""
    pitch = 1.15 * cap  # from one cap to the next
    cross = CROSS if set(CROSS) <= set(labels) else {}
    row_start = left + (3 * pitch + 0.35 * cap if cross else 0)
    row_bottom, row_left = bottom, row_start
    boxes = []
    for label in labels:
        if label in cross:
            row, column = cross[label]
            top, start = bottom - cap - (1 - row) * pitch, left + column * pitch
            boxes.append((top, start, top + cap, start + cap))
            continue
        width = max(cap, _font(cap, label).getlength(label) + 0.6 * cap)
        if row_left > row_start and row_left + width > right:
            row_bottom, row_left = row_bottom - pitch, row_start
        boxes.append((row_bottom - cap, row_left, row_bottom, row_left + width))
        row_left += width + 0.15 * cap
    return boxes


def cap_sprite(label: str, box: Box, lit: bool) -> Sprite:
    """One rounded key: white with a dark letter when `lit`, else dark glass with a white rim and letter."""
    top, left, bottom, right = box
    cap = bottom - top
    pad = math.ceil(0.25 * cap)
    origin = (math.floor(top) - pad, math.floor(left) - pad)
    size = (math.ceil(bottom) + pad - origin[0], math.ceil(right) + pad - origin[1])
    canvas = Image.new("RGBA", (size[1] * SUPERSAMPLING, size[0] * SUPERSAMPLING), (*INK, 0))
    shape = [
        SUPERSAMPLING * edge for edge in (left - origin[1], top - origin[0], right - origin[1], bottom - origin[0])
    ]
    radius = 0.22 * cap * SUPERSAMPLING
    shadow = [shape[0], shape[1] + 0.06 * radius, shape[2], shape[3] + 0.35 * radius]
    ImageDraw.Draw(canvas).rounded_rectangle(shadow, radius, fill=(*INK, SHADOW_ALPHA))
    canvas = canvas.filter(ImageFilter.GaussianBlur(0.07 * cap * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    rim = max(1, round(0.04 * cap * SUPERSAMPLING))
    if lit:
        pen.rounded_rectangle(shape, radius, fill=(*WHITE, 255))
    else:
        pen.rounded_rectangle(shape, radius, fill=(*DARK, DARK_ALPHA), outline=(*WHITE, RIM_ALPHA), width=rim)
    middle = ((shape[0] + shape[2]) / 2, (shape[1] + shape[3]) / 2)
    font = _font(cap * SUPERSAMPLING, label)
    ascent = font.getbbox("H", anchor="ls")[1]  # centred on the capitals, so that "Q" does not sit higher than "W"
    ink = (*INK, 255) if lit else (*WHITE, 235)
    pen.text((middle[0], middle[1] - ascent / 2), label, font=font, fill=ink, anchor="ms")
    return _shrink(canvas, origin)


def gauge_sprite(centre: tuple[float, float], radius: float) -> Sprite:
    """The round glass under the stick, with a thin cross."""
    canvas, origin, middle = _square_canvas(centre, radius)
    pen = ImageDraw.Draw(canvas)
    scaled = radius * SUPERSAMPLING
    thin = max(1, round(0.022 * scaled))
    edges = [middle[1] - scaled, middle[0] - scaled, middle[1] + scaled, middle[0] + scaled]
    shadow = [edges[0], edges[1] + 0.03 * scaled, edges[2], edges[3] + 0.07 * scaled]
    pen.ellipse(shadow, fill=(*INK, SHADOW_ALPHA))
    canvas = canvas.filter(ImageFilter.GaussianBlur(0.06 * scaled))
    pen = ImageDraw.Draw(canvas)
    pen.ellipse(edges, fill=(*DARK, DARK_ALPHA), outline=(*WHITE, RIM_ALPHA), width=2 * thin)
    glass = Image.new("RGBA", canvas.size, (*WHITE, 0))
    pen = ImageDraw.Draw(glass)
    inner = 0.8 * scaled
    pen.line([middle[1] - inner, middle[0], middle[1] + inner, middle[0]], fill=(*WHITE, 60), width=thin)
    pen.line([middle[1], middle[0] - inner, middle[1], middle[0] + inner], fill=(*WHITE, 60), width=thin)
    return _shrink(Image.alpha_composite(canvas, glass), origin)


def stick_sprite(centre: tuple[float, float], radius: float, down_right_deg: tuple[float, float]) -> Sprite:
    """The amber stick and its knob; a white knob in the middle when the mouse rests.

    The length saturates smoothly, so that slow and fast turns of any game can be told apart within the gauge.
    """
    speed = math.hypot(*down_right_deg)  # degrees per frame
    reach = 0.78 * radius * math.tanh(speed / (2 * HALF_GAUGE_DEG) * math.log(3))  # tanh(log(3) / 2) = 1/2
    tip = [c + reach * part / speed if speed else c for c, part in zip(centre, down_right_deg, strict=True)]
    origin = (math.floor(centre[0] - radius), math.floor(centre[1] - radius))
    rows, columns = np.mgrid[0 : math.ceil(2 * radius) + 1, 0 : math.ceil(2 * radius) + 1].astype(np.float32)
    rows, columns = rows + origin[0] + 0.5, columns + origin[1] + 0.5
    along = ((rows - centre[0]) * (tip[0] - centre[0]) + (columns - centre[1]) * (tip[1] - centre[1])) / max(
        reach**2, 1e-9
    )
    along = along.clip(0, 1)
    from_line = np.hypot(
        rows - centre[0] - along * (tip[0] - centre[0]), columns - centre[1] - along * (tip[1] - centre[1])
    )
    from_tip = np.hypot(rows - tip[0], columns - tip[1])
    line = (0.065 * radius - from_line + 0.5).clip(0, 1)  # distance to the edge in px is the coverage of a pixel
    knob = (0.17 * radius - from_tip + 0.5).clip(0, 1)
    alpha = np.maximum(line if reach > 1 else 0 * line, knob)[..., None]
    colour = np.array(AMBER if reach > 1 else WHITE, np.float32)
    return Sprite(*origin, colour * alpha, alpha)


def _font(cap: float, label: str) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=cap * (0.56 if len(label) == 1 else 0.4))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType draws no letters of a given size"
    return font


def _square_canvas(centre: tuple[float, float], radius: float) -> tuple[Image.Image, tuple[int, int], list[float]]:
    reach = radius * 1.25
    origin = (math.floor(centre[0] - reach), math.floor(centre[1] - reach))
    side = (math.ceil(2 * reach) + 1) * SUPERSAMPLING
    middle = [(c - o) * SUPERSAMPLING for c, o in zip(centre, origin, strict=True)]
    return Image.new("RGBA", (side, side), (*INK, 0)), origin, middle


def _shrink(canvas: Image.Image, origin: tuple[int, int]) -> Sprite:
    """Averages a supersampled canvas down to a sprite whose top left corner is `origin`."""
    pixels = np.asarray(canvas, np.float32)
    alpha = pixels[..., 3:] / 255
    size = (canvas.width // SUPERSAMPLING, canvas.height // SUPERSAMPLING)
    small = cv2.resize(np.concatenate([pixels[..., :3] * alpha, alpha], axis=2), size, interpolation=cv2.INTER_AREA)
    return Sprite(*origin, small[..., :3], small[..., 3:])
