"""Spans of a recording in which picture or inputs stand still, and pictures that come more than once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data_pipeline.doctor.signals import EpisodeSignals

ASKED_PX = 0.8  # of motion.WIDTH: a turn by so much between two pictures can be seen
STILL = 0.1  # of the turn that was asked for: less is none
REPEATED = 0.1  # of the largest change near by: less is the same picture again
NEAR = 4  # frame pairs before and after
MOVING = 1.0  # of 255, the mean difference between two pictures from which something moves
CHANGES = 20  # of inputs, before it says something at which rows they come


class Span(NamedTuple):
    """Frames `first` to before `end`, of which `frames` show it."""

    first: int
    end: int
    frames: int


def find_stills(moved_px: np.ndarray, asked_px: np.ndarray) -> list[Span]:
    """Where the picture stands still while the inputs turn: motion (n) against the motion (n) that was asked for.

    Frames that ask for no turn do not end a span.
    """
    asked = np.abs(asked_px) >= ASKED_PX
    still = asked & (np.abs(moved_px) < STILL * np.abs(asked_px))
    spans = []
    for begin, end in runs(still | ~asked):
        frames = begin + np.flatnonzero(still[begin:end])
        if len(frames):
            spans.append(Span(int(frames[0]), int(frames[-1]) + 1, len(frames)))
    return spans


def find_constant_rows(episode: EpisodeSignals) -> list[Span]:
    """The runs of two and more rows in which no input changes."""
    rows = np.concatenate([episode.keyboard, episode.mouse_deg], axis=1)
    same = (rows[1:] == rows[:-1]).all(axis=1)
    return [Span(begin, end + 1, end + 1 - begin) for begin, end in runs(same)]


def count_repeats(change: np.ndarray) -> tuple[int, int]:
    """How many pictures are the one before again, and how many are not, where something moves near by.

    `change` (n) is the mean difference between neighbours.
    """
    if not len(change):
        return 0, 0
    largest = sliding_window_view(np.pad(change, NEAR), 2 * NEAR + 1).max(axis=1)
    moving, alike = largest > MOVING, change < REPEATED * np.maximum(largest, MOVING)
    for begin, end in runs(alike):
        if end - begin > NEAR:  # it stands still, though near the ends something moves
            moving[begin:end] = False
    return int((moving & alike).sum()), int((moving & ~alike).sum())


def input_period(episode: EpisodeSignals) -> int:
    """How many rows in a row are alike, all along: 2 where only every second may differ, 0 if nobody can tell."""
    rows = np.concatenate([episode.keyboard, episode.mouse_deg], axis=1)
    changing = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1))
    return int(np.gcd.reduce(np.diff(changing))) if len(changing) > CHANGES else 0


def runs(wanted: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and one past the last index of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted.astype(np.int8), [0]])))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
