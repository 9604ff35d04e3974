"""What the doctor measures: a few numbers per frame of a recording's picture, and its inputs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.motion import FlowEstimator, FrameMotion, shrink
from data_pipeline.readers import Recording
from data_pipeline.types import Actions

HASH = 8  # rows and columns of a difference hash: 64 bits


class Pairs(NamedTuple):
    """Frame pairs of an episode with the rows of inputs that lead from one frame to the next."""

    episode: str
    first: int  # frame of the episode with which they begin
    motion: np.ndarray  # (n 4) float64, the fields of FrameMotion
    keyboard: np.ndarray  # (n k) uint8
    yaw_pitch: np.ndarray  # (n 2) float64, degrees; 0 without a mouse


@dataclass(frozen=True)
class EpisodeSignals:
    """One episode of n frames; about 50 bytes a frame."""

    id: str
    motion: np.ndarray  # (n - 1, 4) float32, the fields of FrameMotion; row i is between frames i and i + 1
    hashes: np.ndarray  # (n) uint64
    contrast: np.ndarray  # (n) float32, standard deviation of brightness, of 255
    keyboard: np.ndarray  # (n k) uint8
    yaw_pitch: np.ndarray  # (n 2) float32, degrees; 0 without a mouse

    def __len__(self) -> int:
        return len(self.hashes)

    def pairs(self, late: int) -> Pairs:
        """What remains of it if the inputs are `late` frames late."""
        first, end = max(0, -late), max(0, -late, len(self) - 1 - max(0, late))
        rows, motion = slice(first + late, end + late), self.motion[first:end].astype(np.float64)
        return Pairs(self.id, first, motion, self.keyboard[rows], self.yaw_pitch[rows].astype(np.float64))


@dataclass(frozen=True)
class RecordingSignals:
    """One recording."""

    name: str
    episodes: tuple[EpisodeSignals, ...]
    size: tuple[int, int] = (1, 1)  # px, height and width of its pictures
    changes: str = ""  # what is done to the stored pictures to show them, in words

    @property
    def frames(self) -> int:
        return sum(map(len, self.episodes))

    def joined(self, name: str) -> np.ndarray:
        """A field of all its episodes, one after the other."""
        return np.concatenate([getattr(episode, name) for episode in self.episodes])


def measure_recording(recording: Recording, game: GameConfig) -> RecordingSignals:
    """The signals of a recording's episodes, one frame in memory at a time. Raises what its reader raises."""
    unit_deg = game.action_space.mouse_unit_deg
    episodes = recording.read(game)
    measured = tuple(measure(one.id, one.frames(), one.actions, unit_deg) for one in episodes)
    sizes = [(one.footage.height, one.footage.width) for one in episodes] or [(game.height, game.width)]
    return RecordingSignals(recording.name, measured, sizes[0], next((one.footage.changes for one in episodes), ""))


def measure(name: str, frames: Iterable[np.ndarray], actions: Actions, unit_deg: float) -> EpisodeSignals:
    """The signals of `frames` (h w 3) uint8, as many as `actions` has rows; `unit_deg` is their mouse's unit."""
    estimator, motion, hashes, contrast, before = FlowEstimator(), [], [], [], None
    for frame in frames:
        grey = shrink(frame)
        hashes.append(difference_hash(grey))
        contrast.append(grey.std())
        if before is not None:
            if grey.shape != before.shape:
                raise UserError(f"{name}: frame {len(hashes) - 1} has another size than those before it")
            motion.append(estimator.motion(before, grey))
        before = grey
    if len(hashes) != len(actions):
        raise UserError(f"{name} has {len(hashes)} frames and {len(actions)} rows of inputs; there must be as many")
    mouse = actions.mouse if actions.mouse.shape[1] else np.zeros((len(actions), 2))
    return EpisodeSignals(
        name,
        np.array(motion, np.float32).reshape(-1, len(FrameMotion._fields)),
        np.array(hashes, np.uint64),
        np.array(contrast, np.float32),
        (actions.keyboard > 0.5).astype(np.uint8),
        (mouse[:, ::-1] * unit_deg).astype(np.float32),
    )


def difference_hash(grey: np.ndarray) -> np.uint64:
    """64 bits that hardly change when a picture (h w) uint8 is compressed again (dHash)."""
    tiny = cv2.resize(grey, (HASH + 1, HASH), interpolation=cv2.INTER_AREA)
    return np.packbits(tiny[:, 1:] < tiny[:, :-1]).view(np.uint64)[0]
