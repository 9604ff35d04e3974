"""An episode at a lower rate than it was recorded: frames are left out, and what was done meanwhile is kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipeline.types import Actions, ActionSpace, Episode


@dataclass(frozen=True)
class ResampledEpisode:
    """The frames of `recorded` that are on screen at the times of `fps`.

    An action row covers every recorded interval from its frame to the next one that is kept: a key counts as held if it
    was held in any of them, mouse movements add up. So row i still leads from frame i to frame i + 1.
    """

    recorded: Episode
    fps: float

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
        step, recorded = self.recorded.fps / self.fps, len(self.recorded.actions)
        # A hair is added, since 3 * (60 / 20) may come out as 8.999...
        edges = np.floor(np.arange(int(recorded / step) + 2) * step + 1e-6).astype(np.int64)
        return edges[edges <= recorded]

    @property
    def actions(self) -> Actions:
        """(n) rows, one per kept frame."""
        return self._rows

    @cached_property
    def _rows(self) -> Actions:
        starts, rows = self._edges[:-1], self.recorded.actions[: self._edges[-1]]
        return Actions(np.maximum.reduceat(rows.keyboard, starts), np.add.reduceat(rows.mouse, starts))

    def frames(self) -> Iterator[np.ndarray]:
        """Every kept frame in order, (h w 3) uint8 RGB, as recorded."""
        wanted = iter(self._edges[:-1].tolist())
        following = next(wanted, None)
        for number, frame in enumerate(self.recorded.frames()):
            if number == following:
                yield frame
                following = next(wanted, None)
