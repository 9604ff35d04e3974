"""Whether the mouse moves the picture the right way and as far as it should, in each recording and in all."""

from collections.abc import Iterable, Sequence
from functools import reduce
from math import pi, radians, tan
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.alignment import Products
from data_pipeline.doctor.signals import EpisodeSignals
from data_pipeline.doctor.verdicts import UNKNOWN, Checked, Verdict, decide, spread
from data_pipeline.motion import WIDTH

# Natural logarithms of odds. Of 500 clean ViZDoom recordings of 6 s, the worst had 3 for a wrong axis or sign, 9 (the
# next ones 2) against the gain of the others; of 1,000 with another one's inputs, 54 % had 12 and more against it.
AXIS_ODDS, UNRELATED_ODDS = 12.0, 12.0
KNOWN_ODDS = 50.0  # for the gain of all, before a single recording is held against it
# A recording's gain is compared with the others' in parts, since what else moves the picture comes in spells: of the 8
# parts, those with 20 frames of large turns count, 6 must, and in each the gain must differ by such a factor.
PARTS, PARTS_WITH_TURNS, TURNS, APART = 8, 6, 20, 1.5
# The measured gain is less than the field of view says, since flow is 0 where nothing is to be seen: 0.71 to 0.80 of it
# in 5 sets of 20 ViZDoom recordings (90 degrees), and 1.11 to 1.30 of it at half the fps.
FOV_SHARES = (0.53, 1.0)


class Axes(NamedTuple):
    """What may be wrong with the mouse's axes."""

    swapped: Checked
    yaw: Checked  # inverted
    pitch: Checked


class Gain(NamedTuple):
    """How far the picture moves to the right when the view turns."""

    px: float  # of motion.WIDTH per degree; about -0.7 at a field of view of 90 degrees
    turns: int  # frames that it is the median of


class Turns(NamedTuple):
    """What was asked for and what is seen, frame pair by frame pair."""

    degrees: np.ndarray  # (n)
    right_px: np.ndarray  # (n), motion to the right
    first: int = 0  # frame of the episode with which they begin


def judge_axes(products: Sequence[Products | None]) -> Axes:
    """All recordings together, and each by itself, by the products of the one shift that holds for it.

    Nothing is said of those without one.
    """
    counted = [one for one in products if one is not None]
    if not counted:
        return Axes(*3 * [Checked(UNKNOWN, [UNKNOWN] * len(products))])
    whole, own = reduce(Products.__add__, counted).evidence_singly()[0], [_evidence(one) for one in products]
    swapped = _check(_crossed(whole), [_crossed(one) for one in own])
    whole, own = _upright(whole, swapped.whole), [_upright(*one) for one in zip(own, swapped.own, strict=True)]
    yaw = _check(whole[0, 0], [one[0, 0] for one in own])
    pitch = _check(-whole[1, 1], [-one[1, 1] for one in own])
    silent = [i for i, one in enumerate(products) if one is None]
    return Axes(*(one.without(silent) for one in (swapped, yaw, pitch)))


def _evidence(products: Products | None) -> np.ndarray:
    return np.zeros((2, 2)) if products is None else products.evidence_singly()[0]


def _check(whole: float, own: Sequence[float]) -> Checked:
    return spread(decide(whole, AXIS_ODDS), [decide(one, AXIS_ODDS) for one in own])


def _crossed(evidence: np.ndarray) -> float:
    strength = np.abs(evidence)
    return float(strength[0, 1] + strength[1, 0] - strength[0, 0] - strength[1, 1])


def _upright(evidence: np.ndarray, swapped: Verdict) -> np.ndarray:
    """Evidence (2 2) with that of what acts as yaw in the first row."""
    return evidence[::-1] if swapped.status == "fault" else evidence


def find_unrelated(products: Sequence[Products | None]) -> Checked:
    """Recordings whose motion goes against the gain that all have together; nothing is said of those without any."""
    counted = [one for one in products if one is not None]
    whole = reduce(Products.__add__, counted) if counted else None
    if whole is None or whole.evidence()[0] < KNOWN_ODDS:
        return Checked(UNKNOWN, [UNKNOWN] * len(products))
    against = [0.0 if one is None else -float(one.evidence(whole.gain[0])[0]) for one in products]
    return Checked(Verdict("fine"), [decide(one, UNRELATED_ODDS) for one in against])


def read_turns(episode: EpisodeSignals, late: int, axis: int) -> Turns:
    """The column `axis` of yaw and pitch and the motion it leads to, the rows being `late` frames late."""
    first, end = max(0, -late), max(0, len(episode) - 1 - max(0, late))
    rows = episode.yaw_pitch[first + late : end + late, axis] if end > first else np.zeros(0)
    return Turns(rows.astype(np.float64), episode.motion_px[first:end, 0].astype(np.float64), first)


def join_turns(turns: Iterable[Turns]) -> tuple[np.ndarray, np.ndarray]:
    """All degrees, and all motion to the right, (n) each."""
    turns = list(turns)
    return np.concatenate([one.degrees for one in turns]), np.concatenate([one.right_px for one in turns])


def measure_gain(turns: Sequence[Turns]) -> Gain | None:
    """The median over the larger half of all turns: other motion is as often to the left. None without turns."""
    degrees, right = join_turns(turns)
    if not degrees.any():
        return None
    large = np.abs(degrees) >= np.median(np.abs(degrees[degrees != 0]))
    return Gain(float(np.median(right[large] / degrees[large])), int(large.sum()))


def compare_gain(turns: Sequence[Turns], usual_px: float) -> float | None:
    """By what factor a recording's gain differs from the usual one; 1 if it does not, none if it cannot be told."""
    degrees, right = (np.array_split(part, PARTS) for part in join_turns(turns))
    parts = [measure_gain([Turns(*part)]) for part in zip(degrees, right, strict=True)]
    px = np.array([abs(gain.px) for gain in parts if gain and gain.turns >= TURNS])
    if len(px) < PARTS_WITH_TURNS:
        return None
    factors = px / abs(usual_px)
    apart = (factors > APART).all() or (factors < 1 / APART).all()
    return float(np.median(factors)) if apart else 1.0


def share_of_fov(gain: Gain, fov_deg: float) -> float:
    """The gain by what a horizontal field of view of `fov_deg` makes it, averaged over the picture's width.

    A pinhole camera's pixel x of the middle moves by f (1 + (x / f)^2) per radian.
    """
    half = tan(radians(fov_deg) / 2)
    return abs(gain.px) / (pi / 180 * WIDTH / 2 * (1 / half + half / 3))
