"""Which rows of the inputs the motion of the picture answers to: shifts and rates, by how well they explain it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.signals import EpisodeSignals

# Rates that recorders run at, 24 to 60 per second, by each other: rows of the inputs that pass from picture to picture.
RATES = (1.0, 0.4, 0.5, 0.6, 0.8, 5 / 6, 0.96, 25 / 24, 1.2, 1.25, 5 / 3, 2.0, 2.5)
DRIFT = 0.04  # slower drifts of one clock against another are looked for in long recordings
LEAST = 8  # frames of an episode that is looked at
# Of all differences the largest tenth counts as less: cuts, flow that failed, and the few jerks that a coincidence is
# made of. Of 200 ViZDoom recordings with another one's inputs, the worst then had evidence 16 for some shift; with a
# fiftieth it was 22.
CLIPPED = 0.1
TINY = 1e-9


@dataclass(frozen=True)
class Clock:
    """What is tried, and what counts as in time."""

    longest: int  # frames, the largest shift
    by_keys: bool = False  # there is no mouse: keys are what moves the picture
    slow: int = 0  # frames that a picture may take to answer

    @property
    def odds(self) -> float:
        """By what factor more evidence is needed: as there are many keys, more of a coincidence can be explained."""
        return 1.7 if self.by_keys else 1.0

    @property
    def shifts(self) -> np.ndarray:
        return np.arange(-self.longest, self.longest + 1)

    @property
    def in_time(self) -> np.ndarray:
        """Which of the shifts are none, (h) bool."""
        return (self.shifts <= 0) & (self.shifts >= -self.slow)


@dataclass(frozen=True)
class Products:
    """Sums over frame pairs, for h hypotheses: all that a regression of motion (c) on inputs (m) under each one needs.

    Both are differences between neighbours: walking goes on as it was and falls out, a turn begins and ends at once.
    """

    inputs: np.ndarray  # (h m m), inputs with inputs
    mixed: np.ndarray  # (h m c), inputs with motion
    motion: np.ndarray  # (c), squares
    pairs: int

    def __add__(self, other: "Products") -> "Products":
        inputs, mixed, motion = self.inputs + other.inputs, self.mixed + other.mixed, self.motion + other.motion
        return Products(inputs, mixed, motion, self.pairs + other.pairs)

    def __getitem__(self, hypotheses: slice) -> "Products":
        return Products(self.inputs[hypotheses], self.mixed[hypotheses], self.motion, self.pairs)

    @property
    def gain(self) -> np.ndarray:
        """(h m c) motion per unit of input, the best."""
        return np.linalg.pinv(self.inputs, rcond=1e-6, hermitian=True) @ self.mixed

    def evidence(self, gain: np.ndarray | None = None) -> np.ndarray:
        """(h) how much likelier the motion is with each hypothesis than without any, as a natural logarithm.

        Of Gaussian residuals as large as they are found; with the `gain` (m c) that is given, else with the best.
        """
        used = self.gain if gain is None else gain
        explained = 2 * (used * self.mixed).sum(axis=-2) - (used * (self.inputs @ used)).sum(axis=-2)
        left = np.maximum(self.motion - explained, TINY * (1 + self.motion))
        return -self.pairs / 2 * np.log(left / (TINY + self.motion)).sum(axis=-1)

    def evidence_singly(self) -> np.ndarray:
        """(h m c) the same for each input and each motion alone, negative where the one makes the other less."""
        squares = np.diagonal(self.inputs, axis1=1, axis2=2)[..., None] * self.motion
        share = np.minimum(self.mixed**2 / (squares + TINY), 1 - TINY)
        return -self.pairs / 2 * np.log1p(-share) * np.sign(self.mixed)


class Alignment(NamedTuple):
    """How rows lie to pictures, as far as it can be told. Evidences are natural logarithms of odds."""

    late: int  # frames: row i + late is what the motion after frame i answers to
    confidence: float  # in [0, 1], of this shift among all shifts
    evidence: float  # for the likeliest shift against none; below 0: for none against the likeliest shift
    rate: float  # rows per picture: the likeliest
    rate_evidence: float  # for it, against every shift of one row per picture


def measure_products(episodes: Iterable[EpisodeSignals], clock: Clock, rates: Sequence[float]) -> Products:
    """The products for every rate (outer) and every shift (inner), of all episodes.

    Of yaw and pitch with motion to the right and down; by keys: of these with that and divergence.
    """
    long_enough = (episode for episode in episodes if len(episode) >= LEAST)
    return reduce(Products.__add__, (_of_episode(episode, clock, rates) for episode in long_enough))


def _of_episode(episode: EpisodeSignals, clock: Clock, rates: Sequence[float]) -> Products:
    rows = (episode.keyboard if clock.by_keys else episode.yaw_pitch).astype(np.float64)
    motion = clip(np.diff(episode.looks[:, : 3 if clock.by_keys else 2].astype(np.float64), axis=0))
    pairs = len(motion)
    inputs, mixed = [], []
    for rate in rates:
        padded = np.pad(input_changes(rows, rate)[:pairs], ((clock.longest, clock.longest), (0, 0)))
        for first in range(len(clock.shifts)):
            shifted = padded[first : first + pairs]
            inputs.append(shifted.T @ shifted)
            mixed.append(shifted.T @ motion)
    return Products(np.array(inputs), np.array(mixed), (motion**2).sum(axis=0), pairs)


def input_changes(rows: np.ndarray, rate: float) -> np.ndarray:
    """(n m) rows -> (n - 1, m): what is put in between two pictures, less that between the two before.

    `rate` rows pass from picture to picture. Zero where there are no rows any more.
    """
    numbers = np.arange(len(rows) + 1)
    summed = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])
    edges = rate * numbers
    at_edges = np.stack([np.interp(edges, numbers, column) for column in summed.T], axis=1)
    changes = clip(np.diff(at_edges, n=2, axis=0))
    changes[edges[2:] > len(rows) + TINY] = 0
    return changes


def clip(values: np.ndarray) -> np.ndarray:
    """(n m) with the largest of each column cut down, of those that are not zero."""
    limits = [np.quantile(np.abs(column[column != 0]), 1 - CLIPPED) if column.any() else 0.0 for column in values.T]
    return np.clip(values, -np.array(limits), limits)


def rates_for(frames: int) -> tuple[float, ...]:
    """The rates to try on a recording of `frames`: the usual ones, and drifts of 4, 6, 8, 11, ... frames along it."""
    drifts = [2 ** (i / 2) / frames for i in range(4, 61) if 2 ** (i / 2) <= DRIFT * frames]
    return (*RATES, *(1 + drift for drift in drifts), *(1 - drift for drift in drifts))


def align(products: Products, clock: Clock, rates: Sequence[float]) -> Alignment:
    """The likeliest shift and rate; the first of `rates` is 1."""
    found = products.evidence().reshape(len(rates), len(clock.shifts))
    shifted, none = found[0][~clock.in_time].max(), found[0][clock.in_time].max()
    late, rate = int(np.argmax(found[0])), int(np.argmax(found.max(axis=1)))
    return Alignment(
        late=int(clock.shifts[late]),
        confidence=float(1 / np.exp(found[0] - found[0, late]).sum()),
        evidence=float(shifted - none),
        rate=rates[rate],
        rate_evidence=float(found[rate].max() - found[0, late]),
    )
