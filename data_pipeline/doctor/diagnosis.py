"""What is wrong with a set of recordings: pure functions of their signals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from data_pipeline.doctor.alignment import Clock
from data_pipeline.doctor.axes import (
    FOV_SHARES,
    Axes,
    Gain,
    compare_gain,
    find_unrelated,
    judge_axes,
    measure_gain,
    read_turns,
    share_of_fov,
)
from data_pipeline.doctor.copies import report_copies
from data_pipeline.doctor.effects import KeyEffect, measure_keys, report_keys
from data_pipeline.doctor.findings import Case, Finding, drifting, inverted, shifted, swapped
from data_pipeline.doctor.stillness import Repeats, Seen, find_repeats, find_stillness, report_repeats
from data_pipeline.doctor.timing import Timing, time_recordings

KEY_DELAY_S = (
    0.25  # a picture may answer to a key so late, since walking begins slowly; to the mouse it answers at once
)
SHIFT_S = 1.0  # the largest shift that is looked for
LEAST_SHIFT = 8  # frames, however few there are in a second


@dataclass(frozen=True)
class Diagnosis:
    """What was measured and what is wrong."""

    case: Case
    timing: Timing
    axes: Axes | None  # none without a mouse that moves
    gains: list[Gain | None]  # of each recording
    gain: Gain | None  # of all together
    keys: list[KeyEffect]
    findings: list[Finding]


def diagnose(case: Case, fov_deg: float | None = None) -> Diagnosis:
    """All checks of recordings each of which has an episode of alignment.LEAST frames and more."""
    moving = np.array([one.joined("mouse_deg").any(axis=0) for one in case.recordings])
    mouse = bool(moving.any())
    fps = case.game.fps
    slow = 0 if mouse else round(KEY_DELAY_S * fps)
    timing = time_recordings(case.recordings, Clock(max(round(SHIFT_S * fps), LEAST_SHIFT), not mouse, slow))
    repeats = find_repeats(case)
    found = [*report_repeats(case, repeats), *_report_time(case, timing, repeats)]
    axes, gain = None, None
    seen: list[Seen | None] = [None] * len(case.recordings)
    if mouse:
        axes = judge_axes(timing.aligned())
        seen, gain = _see_turns(case, timing, axes)
        found += [*_report_axes(case, axes), *_report_units(case, seen, gain, fov_deg)]
    found += _report_mouse(case, moving, found)
    found += find_stillness(case, seen)
    if axes:
        found += _report_unrelated(case, timing, axes, found)
    lates = [int(shift.amount) for shift in timing.shift.own]
    own = [one for one in found if one.harmful and len(one.recordings) < len(lates)]
    spoilt = {name for one in own for name in one.recordings}
    pairs = [(one, late) for one, late in zip(case.recordings, lates, strict=True) if one.name not in spoilt]
    keys = measure_keys(case, [(episode, late) for recording, late in pairs for episode in recording.episodes])
    # With a mouse whose rows are missing, what it does would count as chance, or as what keys do.
    found += [*report_keys(case, keys, complete=mouse or not case.game.action_space.mouse), *report_copies(case)]
    gains = [None if one is None else measure_gain(one.turns) for one in seen]
    return Diagnosis(case, timing, axes, gains, gain, keys, found)


def _report_time(case: Case, timing: Timing, repeats: Repeats) -> Iterator[Finding]:
    rated = {i for i, rate in enumerate(timing.rate.own) if rate.status == "fault"}
    drifts: dict[bool, list[int]] = {}
    for verdict, numbers in timing.rate.faults():
        if abs(verdict.amount - 1) < 0.05:  # of each recording another estimate
            drifts.setdefault(verdict.amount > 1, []).extend(numbers)
        else:
            yield case.find("rate", numbers, drifting(verdict.amount, case.game.fps), verdict.confidence)
    for numbers in drifts.values():
        rates = [timing.rate.own[i] for i in numbers]
        rate, sure = median(one.amount for one in rates), max(one.confidence for one in rates)
        yield case.find("rate", sorted(numbers), drifting(rate, case.game.fps), sure)
    for verdict, numbers in timing.shift.without(rated).faults():
        # Where each row or picture stays for some frames, its middle is some later than its beginning.
        numbers = [i for i in numbers if abs(verdict.amount) > repeats.longest(i) - 1]
        if not numbers:
            continue
        first_entry = case.game.inputs.first_entry if case.reader == "gf_minecraft" else None
        yield case.find("shift", numbers, shifted(int(verdict.amount), first_entry), verdict.confidence)


def _report_axes(case: Case, axes: Axes) -> Iterator[Finding]:
    for verdict, numbers in axes.swapped.faults():
        yield case.find("swapped axes", numbers, swapped(case), verdict.confidence)
    for verdict, numbers in axes.yaw.faults():
        yield case.find("inverted", numbers, inverted("yaw", case), verdict.confidence)
    for verdict, numbers in axes.pitch.faults():
        yield case.find("inverted", numbers, inverted("pitch", case), verdict.confidence)


def _report_mouse(case: Case, moving: np.ndarray, found: Sequence[Finding]) -> Iterator[Finding]:
    """Axes of the mouse that nobody moves; `moving` (recordings 2) bool, pitch and yaw."""
    if not case.game.action_space.mouse or any(one.fault == "swapped axes" for one in found):
        return
    everyone = range(len(case.recordings))
    pitch, yaw = moving[:, 0].any(), moving[:, 1].any()
    if not yaw:
        what = "yaw never moves" if pitch else "the mouse never moves"
        yield case.find("dead input", everyone, (what, "record it, or set action_space.mouse=false"))
    elif not pitch:
        yield case.note(
            "dead input", everyone, ("pitch never moves", "if players look up and down, it is not recorded")
        )


def _see_turns(case: Case, timing: Timing, axes: Axes) -> tuple[list[Seen | None], Gain | None]:
    """What each recording's turns do, of those whose yaw is known to move the picture; and the usual gain."""
    turns = {}
    for i, recording in enumerate(case.recordings):
        if axes.yaw.own[i].status != "unknown":
            axis, late = int(axes.swapped.own[i].status == "fault"), int(timing.shift.own[i].amount)
            turns[i] = [read_turns(episode, late, axis) for episode in recording.episodes]
    gains = [gain for one in turns.values() if (gain := measure_gain(one))]
    if not gains:
        return [None] * len(case.recordings), None
    usual = Gain(median(gain.px for gain in gains), sum(gain.turns for gain in gains))
    return [Seen(turns[i], usual.px) if i in turns else None for i in range(len(case.recordings))], usual


def _report_units(
    case: Case, seen: Sequence[Seen | None], gain: Gain | None, fov_deg: float | None
) -> Iterator[Finding]:
    if gain is None:
        return
    remedy = "degrees of another unit or sensitivity, or another fps: mend the inputs"
    for i, one in enumerate(seen):
        factor = compare_gain(one.turns, gain.px) if one else None
        if factor is not None and factor != 1:
            what = f"a degree of yaw turns the picture {factor:.2g} times as far as in the other recordings"
            yield case.find("units", [i], (what, remedy))
    share = share_of_fov(gain, fov_deg) if fov_deg else 1.0
    if not FOV_SHARES[0] <= share <= FOV_SHARES[1]:
        what = (
            f"a degree of yaw turns the picture {share:.2g} times as far as at a field of view of {fov_deg:g} degrees"
        )
        yield case.find("units", [i for i, one in enumerate(seen) if one], (what, remedy))


def _report_unrelated(case: Case, timing: Timing, axes: Axes, found: Sequence[Finding]) -> Iterator[Finding]:
    """Of the recordings without a fault of their own, those that go against all together."""
    explained = {name for one in found if one.fault == "still picture" for name in one.recordings}
    checks = (timing.shift, *axes)
    other = {i for check in checks for i, one in enumerate(check.own) if one.status == "fault" and one != check.whole}
    other |= {i for i, one in enumerate(case.recordings) if one.name in explained}
    products = [None if i in other else one for i, one in enumerate(timing.aligned())]
    for verdict, numbers in find_unrelated(products).faults():
        what = "inputs do not go with the picture as those of the other recordings do"
        remedy = "another recording's inputs, or a shift or fps that this one is too short to show: record again"
        yield case.find("unrelated", numbers, (what, remedy), verdict.confidence)
