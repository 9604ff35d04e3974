"""Pictures that move in a known way, and a game of them that does what it is told, with faults on demand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data_pipeline.types import Actions
from sampling.trajectories import Player

FRAMES = 13  # a span's pairs of neighbours, and one


def texture(height: int, width: int, seed: int = 0, colours: int = 1) -> np.ndarray:
    """A smooth random picture (h w 3) uint8, grey or of three colours."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (height // 6, width // 6, colours)).astype(np.uint8)
    return np.broadcast_to(cv2.resize(coarse, (width, height)).reshape(height, width, -1), (height, width, 3))


def panning(step_px: int) -> np.ndarray:
    """Frames (n h w 3) whose picture moves to the right by `step_px` per frame."""
    whole = texture(96, 320)
    return np.stack([whole[:, 80 - step_px * i : 240 - step_px * i] for i in range(FRAMES)])


def zooming(factor: float) -> np.ndarray:
    """Frames (n h w 3) that grow by `factor` per frame about the middle."""
    whole, scales = texture(96, 160), factor ** np.arange(-6.0, 7)
    rows, columns = np.arange(48) - 24, np.arange(80) - 40
    return np.stack([whole[(rows / s + 48).astype(int)][:, (columns / s + 80).astype(int)] for s in scales])


def plain(picture: np.ndarray, frame: int) -> np.ndarray:
    """No fault."""
    return picture


@dataclass(frozen=True)
class ToyGame(Player):
    """A picture that a turn or a step to the side shifts by a pixel, and a step forward or back scales.

    Its keys are those of tiny_world; it remembers everything, and nothing is random.
    """

    yaw_sign: int = 1  # -1 turns the wrong way
    fault: Callable[[np.ndarray, int], np.ndarray] = plain  # what becomes of the picture (h w 3) of a frame

    def pieces(self, pictures: np.ndarray, actions: Sequence[Actions], what: str) -> Iterator[np.ndarray]:
        rollouts = [self.rollout(picture, rows) for picture, rows in zip(pictures, actions, strict=True)]
        yield from np.split(np.stack(rollouts), range(4, len(actions[0]), 4), axis=1)

    def rollout(self, picture: np.ndarray, rows: Actions) -> np.ndarray:
        """Frames (n h w 3) uint8 under `rows`, `picture` being the first."""
        forward, back, left, right = rows.keyboard.T
        steps = np.stack(
            [left - right - self.yaw_sign * rows.mouse[:, 1], rows.mouse[:, 0], 0.03 * (forward - back)], 1
        )
        state = np.cumsum(np.concatenate([np.zeros((1, 3)), steps[:-1]]), axis=0)
        return np.stack([self.fault(_moved(picture, *place), frame) for frame, place in enumerate(state.tolist())])


def _moved(picture: np.ndarray, right_px: float, down_px: float, log_scale: float) -> np.ndarray:
    scale, (height, width) = np.exp(log_scale), picture.shape[:2]
    matrix = np.array([[scale, 0, right_px + (1 - scale) * width / 2], [0, scale, down_px + (1 - scale) * height / 2]])
    return cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_WRAP)
