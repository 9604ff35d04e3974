"""An episode at another rate than it was recorded: frames are left out, and what was done meanwhile is kept."""

from dataclasses import replace

import numpy as np

from data_pipeline.types import Actions, Episode

ROUNDED_S = 6e-4  # by which files round times; Matroska's unit is a millisecond


def resample(episode: Episode, fps: float, recorded_fps: float, times: np.ndarray | None = None) -> Episode:
    """The frames of `episode` that are on screen at the times of `fps`.

    `times` (n), in seconds, says when each recorded frame is shown; without it they come evenly at `recorded_fps`.
    An action row covers every recorded interval from its frame to the next one that is kept: a key counts as held if it
    was held in any of them, mouse movements add up. So row i still leads from frame i to frame i + 1. Where uneven
    `times` leave a frame on screen for more than one row, the last of these has its mouse movement.
    """
    if times is None:
        shown = np.arange(len(episode.actions) + 1) / recorded_fps
        near_s = 1e-6 / recorded_fps  # since 3 * (60 / 20) may come out as 8.999...
    else:
        shown, near_s = times - times[0], ROUNDED_S
        last_s = np.median(np.diff(shown)) if len(shown) > 1 else 1 / fps
        shown = np.append(shown, shown[-1] + last_s)
    ticks = np.arange(int((shown[-1] + near_s) * fps) + 2) / fps
    ticks = ticks[ticks <= shown[-1] + near_s]
    edges = np.searchsorted(shown, ticks + near_s, side="right") - 1  # only intervals that are whole
    counts = np.bincount(edges[:-1], minlength=episode.stop - episode.first)
    return replace(episode, actions=_join_rows(episode.actions, edges), shown=counts)


def _join_rows(recorded: Actions, edges: np.ndarray) -> Actions:
    """One row for all recorded rows from each of `edges` (n + 1) to the next."""
    starts, ends = edges[:-1], edges[1:]
    if not len(starts):
        return recorded[:0]
    rows = recorded[: max(ends[-1], starts[-1] + 1)]
    mouse = np.add.reduceat(rows.mouse, starts) * (ends > starts)[:, None]
    return Actions(np.maximum.reduceat(rows.keyboard, starts), mouse.astype(rows.mouse.dtype))
