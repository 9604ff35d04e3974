"""What the doctor looks at: per frame of a recording a few numbers of the picture, and the inputs."""

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.motion import Eye, Look, shrink
from data_pipeline.readers import Recording
from data_pipeline.types import Actions

HASH = 8  # rows and columns of a picture's fingerprint: 64 bits


@dataclass(frozen=True)
class EpisodeSignals:
    """One episode of n frames; about 50 bytes a frame."""

    id: str
    looks: np.ndarray  # (n - 1, 4) float32, the fields of Look; row i is between frames i and i + 1
    prints: np.ndarray  # (n) uint64, fingerprints
    contrast: np.ndarray  # (n) float32, standard deviation of brightness, of 255
    keyboard: np.ndarray  # (n k) uint8
    mouse_deg: np.ndarray  # (n 2) float32, pitch, yaw; (n 0) without a mouse

    def __len__(self) -> int:
        return len(self.prints)

    @property
    def motion_px(self) -> np.ndarray:
        """(n - 1, 2): to the right, down."""
        return self.looks[:, :2]

    @property
    def change(self) -> np.ndarray:
        """(n - 1) of 255."""
        return self.looks[:, 3]

    @property
    def yaw_pitch(self) -> np.ndarray:
        """(n 2) degrees: what moves the picture sideways, and what up and down."""
        return self.mouse_deg[:, ::-1]


@dataclass(frozen=True)
class RecordingSignals:
    """One recording."""

    name: str
    episodes: tuple[EpisodeSignals, ...]
    size: tuple[int, int] = (1, 1)  # px, height and width of its pictures
    changes: str = ""  # what is done to the stored pictures to show them, in words

    @property
    def frames(self) -> int:
        return sum(len(episode) for episode in self.episodes)

    @property
    def longest(self) -> int:
        """Frames of its longest episode."""
        return max((len(episode) for episode in self.episodes), default=0)

    def joined(self, name: str) -> np.ndarray:
        """A field or property of all its episodes, one after the other."""
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
    eye, looks, prints, contrast, before = Eye(), [], [], [], None
    for frame in frames:
        grey = shrink(frame)
        prints.append(fingerprint(grey))
        contrast.append(grey.std())
        if before is not None and grey.shape != before.shape:
            raise UserError(f"{name}: frame {len(prints) - 1} has another size than those before; all must have one")
        if before is not None:
            looks.append(eye.look(before, grey))
        before = grey
    if len(prints) != len(actions):
        raise UserError(f"{name} has {len(prints)} frames and {len(actions)} rows of inputs; there must be as many")
    return EpisodeSignals(
        name,
        np.array(looks, np.float32).reshape(-1, len(Look._fields)),
        np.array(prints, np.uint64),
        np.array(contrast, np.float32),
        (actions.keyboard > 0.5).astype(np.uint8),
        (actions.mouse * unit_deg).astype(np.float32),
    )


def fingerprint(grey: np.ndarray) -> np.uint64:
    """64 bits that hardly change when a picture (h w) uint8 is compressed anew: the difference hash."""
    tiny = cv2.resize(grey, (HASH + 1, HASH), interpolation=cv2.INTER_AREA)
    return np.packbits(tiny[:, 1:] < tiny[:, :-1]).view(np.uint64)[0]
