"""An episode at another rate than it was recorded: frames are left out, and what was done meanwhile is kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from configs.game import ActionSpace
from data_pipeline.types import Actions, Episode

ROUNDED_S = 6e-4  # by which files round times; Matroska's unit is a millisecond


@dataclass(frozen=True)
class ResampledEpisode:
    """The frames of `recorded` that are on screen at the times of `fps`.

    An action row covers every recorded interval from its frame to the next one that is kept: a key counts as held if it
    was held in any of them, mouse movements add up. So row i still leads from frame i to frame i + 1. Where uneven
    `times` leave a frame on screen for more than one row, the last of these has its mouse movement.
    """

    recorded: Episode
    fps: float
    times: np.ndarray | None = None  # (n) s, when each recorded frame is shown; evenly without

    @property
    def id(self) -> str:
        return self.recorded.id

    @property
    def height(self) -> int:
        return self.recorded.height

    @property
    def width(self) -> int:
        return self.recorded.width

    @property
    def action_space(self) -> ActionSpace:
        return self.recorded.action_space

    @cached_property
    def _edges(self) -> np.ndarray:
        """Where the intervals begin, in recorded frames (n + 1), the last one's end included: whole intervals only."""
        if self.times is None:
            shown = np.arange(len(self.recorded.actions) + 1) / self.recorded.fps
            near = 1e-6 / self.recorded.fps  # since 3 * (60 / 20) may come out as 8.999...
        else:
            shown, near = self.times - self.times[0], ROUNDED_S
            last_s = np.median(np.diff(shown)) if len(shown) > 1 else 1 / self.fps
            shown = np.append(shown, shown[-1:] + last_s)
        ticks = np.arange(int((shown[-1] + near) * self.fps) + 2) / self.fps
        ticks = ticks[ticks <= shown[-1] + near]
        return np.searchsorted(shown, ticks + near, side="right") - 1

    @property
    def actions(self) -> Actions:
        """(n) rows, one per kept frame."""
        return self._rows

    @cached_property
    def _rows(self) -> Actions:
        starts, ends = self._edges[:-1], self._edges[1:]
        if not len(starts):
            return self.recorded.actions[:0]
        rows = self.recorded.actions[: max(ends[-1], starts[-1] + 1)]
        mouse = np.add.reduceat(rows.mouse, starts) * (ends > starts)[:, None]
        return Actions(np.maximum.reduceat(rows.keyboard, starts), mouse.astype(rows.mouse.dtype))

    def frames(self) -> Iterator[np.ndarray]:
        """Every kept frame in order, (h w 3) uint8 RGB, as recorded."""
        wanted = iter(self._edges[:-1].tolist())
        following = next(wanted, None)
        for number, frame in enumerate(self.recorded.frames()):
            while number == following:
                yield frame
                following = next(wanted, None)
