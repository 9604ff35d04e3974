"""How the picture moves, measured without a trained judge: Farneback optical flow, averaged over a chunk."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from einops import rearrange

from data_pipeline.motion import EXPECTED, divergence
from model.layout import CHUNK_FRAMES

EVALUATOR = f"OpenCV {cv2.__version__} Farneback flow, mean over a chunk's {CHUNK_FRAMES - 1} frame pairs"
TURNING_DEG = 1.0  # degrees per frame from which a chunk's mean yaw counts as a commanded turn


class Motion(NamedTuple):
    """The mean motion of one chunk."""

    right_px: float  # px per frame, > 0 if the picture moves to the right
    divergence: float  # per frame, > 0 if it expands


def chunk_motion(frames: np.ndarray) -> Motion:
    """The mean motion between neighbours among `frames` (n h w 3) uint8."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    # pyramid 0.5 x 3 levels, window 15 px, 3 iterations, polynomial of 5 px with sigma 1.2: OpenCV's own example
    flows = [
        cv2.calcOpticalFlowFarneback(*pair, np.zeros((*grey[0].shape, 2), np.float32), 0.5, 3, 15, 3, 5, 1.2, 0)
        for pair in pairwise(grey)
    ]
    right = np.mean([float(flow[..., 0].mean()) for flow in flows])
    return Motion(float(right), float(np.mean([divergence(flow) for flow in flows])))


def all_motions(rollouts: np.ndarray) -> list[Motion]:
    """The motion of every chunk of `rollouts` (b n h w 3), rollout by rollout; OpenCV leaves the threads to us."""
    chunks = rearrange(rollouts, "b (m n) h w c -> (b m) n h w c", n=CHUNK_FRAMES)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(chunk_motion, chunks))


def share_obeyed(command: str, measured: Sequence[Motion]) -> float:
    """The share of chunks whose picture moves the way that `command` asks for."""
    quantity, sign = EXPECTED[command]
    return float(np.mean([sign * getattr(motion, quantity) > 0 for motion in measured]))


def held_table(made: Mapping[str, Sequence[Motion]]) -> dict[str, dict[str, float]]:
    """Per command the share of generated chunks that obey, and of those that move so with nothing pressed."""
    return {
        command: {
            "obeyed": share_obeyed(command, chunks),
            "idle": share_obeyed(command, made["idle"]),
            "chunks": len(chunks),
        }
        for command, chunks in made.items()
        if command in EXPECTED
    }


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
