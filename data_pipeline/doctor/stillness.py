"""Whether picture or inputs stand still where they should not, or come more than once, in words."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.axes import Turns, join_turns
from data_pipeline.doctor.findings import Case, Finding
from data_pipeline.doctor.signals import EpisodeSignals
from data_pipeline.doctor.spans import (
    ASKED_PX,
    STILL,
    Span,
    count_repeats,
    find_constant_rows,
    find_stills,
    input_period,
)

STILL_S = 0.75  # that the picture may stand still while inputs turn: of 500 clean ViZDoom recordings one did for 0.4 s
STARTS = 3  # recordings that begin with two such frames, before it is no chance; and half of those that turn at once
UNCHANGED, UNCHANGED_SHARE = 0.3, 0.95  # of 255, and of the pictures: a black or frozen capture
REPEATS_SHARE = 0.15  # of pictures; the worst of those recordings had 0.09, 24 in 30 fps have 0.2
CONSTANT_S = 2.0  # without any change of the inputs
IDLE_S = 10.0
LIKE_ALWAYS = 0.7  # the picture's motion then, of its usual one (standard deviations)
EXPLAINED = 0.2  # of that motion's variance, by yaw, before its absence says something


class Seen(NamedTuple):
    """What is known of how a recording's turns move its picture, for each episode."""

    turns: list[Turns]
    gain_px: float  # usual motion to the right per degree


class Repeats(NamedTuple):
    """What comes more than once, by the numbers of the recordings in which it does."""

    pictures: dict[int, float]  # the share of the moving ones that are the one before again
    rows: dict[int, int]  # how many are alike

    def longest(self, number: int) -> float:
        """For how many frames a picture, or a row, stays."""
        return max(1 / (1 - self.pictures.get(number, 0.0)), self.rows.get(number, 1))


def find_repeats(case: Case) -> Repeats:
    """The recordings whose pictures or rows come more than once."""
    repeats = Repeats({}, {})
    for i, recording in enumerate(case.recordings):
        repeated, others = np.sum([count_repeats(one.change) for one in recording.episodes], axis=0)
        if others and repeated >= max(REPEATS_SHARE * (repeated + others), case.game.fps / 2):
            repeats.pictures[i] = float(repeated / (repeated + others))
        period = int(np.gcd.reduce([input_period(one) for one in recording.episodes]))
        if period > 1:
            repeats.rows[i] = period
    return repeats


def report_repeats(case: Case, repeats: Repeats) -> Iterator[Finding]:
    """A finding for pictures, and one for each period of rows."""
    fps = case.game.fps
    if repeats.pictures:
        share = float(np.median(list(repeats.pictures.values())))
        what = f"{share:.0%} of the moving pictures are the one before again: {(1 - share) * fps:.3g} a second are new"
        remedy = f"record at {fps:g} pictures a second, or say game.inputs.fps={fps:g} and a lower game.fps"
        yield case.find("repeats", repeats.pictures, (what, remedy))
    for period in sorted(set(repeats.rows.values())):
        what = f"{period} rows of inputs in a row are always alike: they are logged {fps / period:.3g} times a second"
        numbers = [i for i, one in repeats.rows.items() if one == period]
        yield case.find("repeats", numbers, (what, "log them with every picture, or record at that rate"))


def find_stillness(case: Case, seen: Sequence[Seen | None]) -> Iterator[Finding]:
    """All findings; of a recording of which nothing is known, those that need nothing."""
    unchanged = [i for i, one in enumerate(case.recordings) if _is_unchanged(one.joined("change"), case.game.fps)]
    if unchanged:
        yield case.find("still picture", unchanged, ("the picture never changes: black or frozen", "record again"))
    known = {i: one for i, one in enumerate(seen) if one is not None and i not in unchanged}
    if known:
        yield from _stills(case, known)
        yield from _constant(case, known)


def _is_unchanged(change: np.ndarray, fps: float) -> bool:
    return len(change) >= fps and (change < UNCHANGED).mean() >= UNCHANGED_SHARE


def _stills(case: Case, known: dict[int, Seen]) -> Iterator[Finding]:
    starting, standing, fps = [], [], case.game.fps
    for i, seen in known.items():
        for episode, turns in zip(case.recordings[i].episodes, seen.turns, strict=True):
            asked = seen.gain_px * turns.degrees
            spans = find_stills(turns.right_px, asked)
            if turns.first == 0 and len(asked) > 1 and (np.abs(asked[:2]) >= ASKED_PX).all():
                starting.append((i, spans[0].frames if spans and spans[0].first == 0 else 0))
            for span in (one for one in spans if one.frames >= STILL_S * fps):
                where = _frames(episode, span, turns.first)
                what = f"the picture stands still for {span.frames} frames in which inputs turn ({where})"
                remedy = "cut them out: a menu, a lost focus, a frozen capture"
                yield case.find("still picture", [i], (what, remedy))
                standing.append(i)
    late = [(i, frames) for i, frames in starting if frames >= 2 and i not in standing]
    if len(late) >= STARTS and len(late) >= len(starting) / 2:
        frames = int(np.median([frames for _, frames in late]))
        what = f"the picture stands still in the first {frames} frames, though inputs turn"
        yield case.find("still picture", dict(late), (what, f"begin to record {frames + 1} frames later"))


def _constant(case: Case, known: dict[int, Seen]) -> Iterator[Finding]:
    degrees, moved = join_turns(turns for seen in known.values() for turns in seen.turns)
    usual = moved.std()
    telling = usual > 0 and degrees.std() > 0 and np.corrcoef(degrees, moved)[0, 1] ** 2 >= EXPLAINED
    for i in known:
        for episode in case.recordings[i].episodes:
            for span in find_constant_rows(episode):
                seconds, motion = span.frames / case.game.fps, episode.motion_px[span.first : span.end, 0]
                if telling and seconds >= CONSTANT_S and motion.std() >= LIKE_ALWAYS * usual:
                    what = f"no input changes for {seconds:.1f} s ({_frames(episode, span)}), though the picture turns"
                    yield case.find("constant inputs", [i], (what, "cut them out: a frozen log, a cutscene, a replay"))
                elif seconds >= IDLE_S and np.abs(motion).mean() < STILL * ASKED_PX:
                    what = f"nothing happens for {seconds:.1f} s ({_frames(episode, span)})"
                    yield case.note("constant inputs", [i], (what, "leave it out if there is much of it"))


def _frames(episode: EpisodeSignals, span: Span, first: int = 0) -> str:
    return f"{episode.id}, frames {first + span.first} to {first + span.end - 1}"
