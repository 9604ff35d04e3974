"""How the picture moves, measured without a trained judge: Farneback optical flow, averaged over a chunk."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from einops import rearrange

from configs.game import ActionSpace
from data_pipeline.motion import EXPECTED, divergence
from data_pipeline.types import Actions
from model.layout import CHUNK_FRAMES

EVALUATOR = f"OpenCV {cv2.__version__} Farneback flow, mean over a chunk's {CHUNK_FRAMES - 1} frame pairs"
TURNING_DEG = 1.0  # degrees per frame from which a chunk's mean yaw counts as a commanded turn


@dataclass(frozen=True)
class Motion:
    """The mean motion of one chunk."""

    right_px: float  # px per frame, > 0 if the picture moves to the right
    divergence: float  # per frame, > 0 if it moves apart


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


def held_command(actions: Actions, action_space: ActionSpace) -> str | None:
    """The one command whose effect on the picture is known that these rows hold, if there is one.

    A turn may come with a key that does not itself move the picture sideways.
    """
    share = dict(zip(action_space.keys, actions.keyboard.mean(axis=0).tolist(), strict=True))
    yaw_deg = float(actions.mouse[:, 1].mean()) * action_space.mouse_unit_deg if action_space.mouse else 0.0
    if abs(yaw_deg) > TURNING_DEG:
        sideways = max((share.get(key, 0.0) for key in ("left", "right")), default=0.0)
        return None if sideways > 0.1 else "turn_right" if yaw_deg > 0 else "turn_left"
    held = [key for key, value in share.items() if value > 0.1]
    if abs(yaw_deg) > TURNING_DEG / 2 or len(held) != 1 or share[held[0]] < 0.9:
        return None
    return held[0] if held[0] in EXPECTED else None


def held_table(
    made: Mapping[str, Sequence[Motion]], real: Mapping[str, Sequence[Motion]]
) -> dict[str, dict[str, float]]:
    """Per command the share of chunks that obey, of generated ones and, where there are any, of real ones.

    Beside it the share that move the same way when nothing is pressed.
    """
    table = {}
    for command, chunks in made.items():
        if command in EXPECTED and chunks:
            table[command] = {"obeyed": share_obeyed(command, chunks), "chunks": len(chunks)}
            if made.get("idle"):
                table[command]["idle"] = share_obeyed(command, made["idle"])
            if real.get(command):
                table[command] |= {"real": share_obeyed(command, real[command]), "real_chunks": len(real[command])}
    return table
