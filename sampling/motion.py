"""How the picture moves, measured without a trained judge: Farneback optical flow, averaged over a chunk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from data_pipeline.types import CHUNK_FRAMES

EVALUATOR = f"OpenCV {cv2.__version__} Farneback flow, mean over a chunk's {CHUNK_FRAMES - 1} frame pairs"
TURNING_DEG = 1.0  # degrees per frame from which a chunk's mean yaw counts as a commanded turn

# Which way the picture moves under a held command: to the right (px > 0) when the view turns or steps left, apart
# (divergence > 0) when it walks forward.
EXPECTED = {
    "turn_left": ("right_px", 1),
    "turn_right": ("right_px", -1),
    "left": ("right_px", 1),
    "right": ("right_px", -1),
    "forward": ("divergence", 1),
    "back": ("divergence", -1),
}


@dataclass(frozen=True)
class Motion:
    """The mean motion of one chunk."""

    right_px: float  # px per frame, > 0 if the picture moves to the right
    divergence: float  # per frame, > 0 if it moves apart


def chunk_motion(frames: np.ndarray) -> Motion:
    """The mean motion between neighbours among `frames` (n h w 3) uint8."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    motions = [_pair_motion(before, after) for before, after in pairwise(grey)]
    right, divergence = np.mean(motions, axis=0)
    return Motion(float(right), float(divergence))


def motions(frames: np.ndarray) -> list[Motion]:
    """The motion of every whole chunk of `frames` (n h w 3) uint8, one after the other."""
    starts = range(0, len(frames) - CHUNK_FRAMES + 1, CHUNK_FRAMES)
    return [chunk_motion(frames[start : start + CHUNK_FRAMES]) for start in starts]


def _pair_motion(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    start = np.zeros((*before.shape, 2), np.float32)
    # pyramid 0.5 x 3 levels, window 15 px, 3 iterations, polynomial of 5 px with sigma 1.2: OpenCV's own example
    flow = cv2.calcOpticalFlowFarneback(before, after, start, 0.5, 3, 15, 3, 5, 1.2, 0)
    divergence = np.gradient(flow[..., 0], axis=1) + np.gradient(flow[..., 1], axis=0)
    return float(flow[..., 0].mean()), float(divergence.mean())


def share_obeyed(command: str, measured: Sequence[Motion]) -> float:
    """The share of chunks whose picture moves the way that `command` asks for."""
    quantity, sign = EXPECTED[command]
    return float(np.mean([sign * getattr(motion, quantity) > 0 for motion in measured]))


def turn_agreement(yaw_deg: Sequence[float], measured: Sequence[Motion]) -> dict[str, float]:
    """How the picture's horizontal motion answers the commanded mean yaw (degrees per frame, > 0 right) of each chunk.

    `agreement`: share of the turning chunks whose picture moves against the turn; `correlation`: of -yaw and px over
    all chunks; `turning_chunks`. What cannot be computed is left out.
    """
    yaw, right = np.array(yaw_deg), np.array([motion.right_px for motion in measured])
    turning = np.abs(yaw) > TURNING_DEG
    figures: dict[str, float] = {"turning_chunks": int(turning.sum())}
    if turning.any():
        figures["agreement"] = float((yaw[turning] * right[turning] < 0).mean())
    if len(yaw) > 2 and yaw.std() > 0 and right.std() > 0:
        figures["correlation"] = float(np.corrcoef(-yaw, right)[0, 1])
    return figures


def held_table(measured: Mapping[str, Sequence[Motion]]) -> dict[str, dict[str, float]]:
    """Per command the share of chunks that obey, and beside it the same sign's share when nothing is pressed."""
    table = {}
    for command, chunks in measured.items():
        if command in EXPECTED and chunks:
            table[command] = {"obeyed": share_obeyed(command, chunks), "chunks": len(chunks)}
            if measured.get("idle"):
                table[command]["idle"] = share_obeyed(command, measured["idle"])
    return table
