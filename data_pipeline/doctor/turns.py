"""Whether turns of the mouse move the picture as far as they should, and where picture or inputs stand still."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import pi, radians, tan
from statistics import median

import numpy as np

from data_pipeline.doctor.findings import CheckResult, Dataset, Finding
from data_pipeline.doctor.pictures import runs
from data_pipeline.doctor.signals import EpisodeSignals
from data_pipeline.motion import WIDTH

# A recording's px per degree are compared with the others' in parts, since what else moves the picture comes in spells:
# of the 8 parts, those with 20 frames of large turns count, 6 must, and in each they must differ by such a factor.
PARTS, PARTS_WITH_TURNS, TURNS, APART = 8, 6, 20, 1.5
# Measured px per degree are less than the field of view says, since flow is 0 where nothing is to be seen: 0.71 to 0.80
# of it in 5 sets of 20 ViZDoom recordings (90 degrees), and 1.11 to 1.30 of it at half the fps.
FOV_SHARES = (0.53, 1.0)
ASKED_PX = 0.8  # of motion.WIDTH: a turn by so much between two pictures can be seen
STILL = 0.1  # of the turn that was asked for: less is none
STILL_S = 0.75  # that the picture may stand still while inputs turn: of 500 clean ViZDoom recordings one did for 0.4 s
CONSTANT_S = 2.0  # without any change of the inputs
LIKE_ALWAYS = 0.7  # the picture's motion then, of its usual one (standard deviations)
EXPLAINED = 0.2  # of that motion's variance, by yaw, before its absence says something


def report_turns(
    data: Dataset, checks: dict[str, CheckResult], excluded: set[str], fov_deg: float | None
) -> Iterator[Finding]:
    """Findings of units, and of stillness in the recordings that are not `excluded`."""
    turns, swapped, late = {}, checks["axes_swapped"].status[1:] > 0, checks["frames_late"].amount[1:]
    for i in np.flatnonzero(checks["yaw_inverted"].status[1:]).tolist():  # others' yaw is not known to move the picture
        episodes = [episode.aligned(int(late[i])) for episode in data.recordings[i].episodes]
        turns[i] = [replace(it, yaw_pitch=it.yaw_pitch[:, ::-1]) if swapped[i] else it for it in episodes]
    px = [px for episodes in turns.values() for px, count in [px_per_degree(yaw_and_motion(episodes))] if count]
    if px:
        yield from _units(data, turns, median(px), fov_deg)
        episodes = [(i, it) for i in turns if data.recordings[i].name not in excluded for it in turns[i]]
        yield from _stills(data, episodes, median(px))
        yield from _constant(data, episodes)


def yaw_and_motion(episodes: Iterable[EpisodeSignals]) -> np.ndarray:
    """(n 2) all degrees, and px of all motion to the right."""
    return np.concatenate([np.column_stack([it.yaw_pitch[:, 0], it.motion[:, 0]]) for it in episodes])


def px_per_degree(turns: np.ndarray) -> tuple[float, int]:
    """The median over the larger half of all `turns` (n 2), and how many these are; 0 without turns.

    Other motion is as often to the left. About -0.7 at a field of view of 90 degrees.
    """
    degrees, right_px = turns.T
    if not degrees.any():
        return 0.0, 0
    large = np.abs(degrees) >= np.median(np.abs(degrees[degrees != 0]))
    return float(np.median(right_px[large] / degrees[large])), int(large.sum())


def _units(
    data: Dataset, turns: dict[int, list[EpisodeSignals]], usual: float, fov_deg: float | None
) -> Iterator[Finding]:
    what = "a degree of yaw turns the picture {:.2g} times as far as"
    for i, episodes in turns.items():
        parts = map(px_per_degree, np.array_split(yaw_and_motion(episodes), PARTS))
        factors = np.array([abs(px / usual) for px, count in parts if count >= TURNS])
        if len(factors) >= PARTS_WITH_TURNS and ((factors > APART).all() or (factors < 1 / APART).all()):
            yield data.find("units", [i], f"{what.format(np.median(factors))} in the other recordings")
    if fov_deg:
        # A pinhole camera's pixel x of the middle moves by f (1 + (x / f)^2) per radian; averaged over the width.
        half = tan(radians(fov_deg) / 2)
        share = abs(usual) / (pi / 180 * WIDTH / 2 * (1 / half + half / 3))
        if not FOV_SHARES[0] <= share <= FOV_SHARES[1]:
            yield data.find("units", turns, f"{what.format(share)} at a field of view of {fov_deg:g} degrees")


def _stills(data: Dataset, episodes: Sequence[tuple[int, EpisodeSignals]], px: float) -> Iterator[Finding]:
    """Pictures that stand still while inputs turn; frames that ask for no turn do not end it."""
    for i, it in episodes:
        asked = np.abs(px * it.yaw_pitch[:, 0])
        still = (asked >= ASKED_PX) & (np.abs(it.motion[:, 0]) < STILL * asked)
        for begin, end in runs(still | (asked < ASKED_PX)):
            frames = it.first + begin + np.flatnonzero(still[begin:end])
            if len(frames) >= STILL_S * data.game.fps:
                where = f"{it.id}, frames {frames[0]} to {frames[-1]}"
                what = f"the picture stands still for {len(frames)} frames in which inputs turn ({where})"
                yield data.find("still picture", [i], what)


def _constant(data: Dataset, episodes: Sequence[tuple[int, EpisodeSignals]]) -> Iterator[Finding]:
    """Inputs that stay the same although the picture turns."""
    degrees, moved = yaw_and_motion(it for _, it in episodes).T if episodes else np.zeros((2, 1))
    if not degrees.std() or not moved.std() or np.corrcoef(degrees, moved)[0, 1] ** 2 < EXPLAINED:
        return
    for i, it in episodes:
        rows = np.column_stack([it.keyboard, it.yaw_pitch])
        for begin, end in runs((rows[1:] == rows[:-1]).all(axis=1)):
            seconds, motion = (end + 1 - begin) / data.game.fps, it.motion[begin : end + 1, 0]
            if seconds >= CONSTANT_S and motion.std() >= LIKE_ALWAYS * moved.std():
                where = f"{it.id}, frames {it.first + begin} to {it.first + end}"
                what = f"no input changes for {seconds:.1f} s ({where}), though the picture turns"
                yield data.find("constant inputs", [i], what)
