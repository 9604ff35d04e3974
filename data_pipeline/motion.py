"""How the picture moves between two frames, and which way each command moves it."""

from typing import NamedTuple

import cv2
import numpy as np

WIDTH = 80  # px that pictures are shrunk to; FrameMotion is in these

# Which way the picture moves under a command: to the right (px > 0) when the view turns or steps left; it expands
# (divergence > 0) when it walks forward; down when it looks up.
EXPECTED = {
    "turn_left": ("right_px", 1),
    "turn_right": ("right_px", -1),
    "left": ("right_px", 1),
    "right": ("right_px", -1),
    "forward": ("divergence", 1),
    "back": ("divergence", -1),
    "look_up": ("down_px", 1),
    "look_down": ("down_px", -1),
}


class FrameMotion(NamedTuple):
    """Between two frames."""

    right_px: float  # px of WIDTH, > 0 if the picture moves to the right
    down_px: float
    divergence: float  # > 0 if the picture expands
    change: float  # mean absolute difference of brightness, of 255


def measure_motion(flow: cv2.DISOpticalFlow, before: np.ndarray, after: np.ndarray) -> FrameMotion:
    """The motion between two grey pictures (h w) uint8, where their edges show it; pairs must come in order, as `flow`
    keeps state."""
    px = flow.calc(before, after, np.zeros((*before.shape, 2), np.float32))
    # A plain wall shows no motion: upright edges show motion to the side, level ones motion up and down.
    upright, level = (
        1 + cv2.GaussianBlur(cv2.Sobel(before, cv2.CV_32F, *axis) ** 2, (0, 0), 2) for axis in ((1, 0), (0, 1))
    )
    right, down = np.average(px[..., 0], weights=upright), np.average(px[..., 1], weights=level)
    return FrameMotion(float(right), float(down), divergence(px), float(cv2.absdiff(before, after).mean()))


def divergence(flow: np.ndarray) -> float:
    """How fast a picture expands: the mean over a flow (h w 2) in px, right and down; > 0 if it does."""
    return float((np.gradient(flow[..., 0], axis=1) + np.gradient(flow[..., 1], axis=0)).mean())


def shrink(frame: np.ndarray) -> np.ndarray:
    """(h w 3) uint8 RGB -> (h WIDTH) uint8 grey, in proportion."""
    height = max(round(frame.shape[0] * WIDTH / frame.shape[1]), 32)
    return cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (WIDTH, height), interpolation=cv2.INTER_AREA)
