"""Recordings that are there twice, as they are or nearly: compressed anew, or a part of one another."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.findings import Case, Finding
from data_pipeline.doctor.signals import RecordingSignals

CONTRAST = 8.0  # of 255: pictures below look all alike (black, fog, a fade)
LEAST_SHARE = 0.5  # of the shorter recording's pictures, that two have in common
COMMON = 50  # recordings with the same picture: then it is a menu or a loading screen
VOTES = 3  # equal pictures at one distance in time before two recordings are compared
NEAR_BITS = 10  # of the 64 of a fingerprint, that may differ; of unrelated pictures, 20 and more do
INPUT_CHANGES = 20  # in inputs before their being equal means something


class Copies(NamedTuple):
    """Two recordings that have pictures or inputs in common."""

    one: str
    other: str
    share: float  # of the shorter one's pictures, in [0, 1]
    later: int  # frame i of `one` is frame i + later of `other`
    same_inputs: bool  # all of them


def report_copies(case: Case) -> Iterator[Finding]:
    """A finding for each recording that is another one's copy."""
    seen: set[str] = set()
    remedy = "delete one of them: a copy that is held out makes the model look better than it is"
    for pair in find_copies(case.recordings):
        if pair.other in seen:
            continue
        seen.add(pair.other)
        if not pair.share:
            what, remedy_then = "all inputs are the same, the pictures are not", "find out whose inputs they are"
        elif pair.same_inputs:
            what, remedy_then = f"the same recording: {pair.share:.0%} of the pictures and all inputs", remedy
        else:
            later = f", {abs(pair.later)} frames apart" if pair.later else ""
            what, remedy_then = f"nearly the same recording: {pair.share:.0%} of the pictures{later}", remedy
        yield Finding("copy", (pair.one, pair.other), what, remedy_then)


def find_copies(recordings: Sequence[RecordingSignals]) -> list[Copies]:
    """All pairs that have half of the shorter one's pictures in common, or all inputs."""
    prints = [recording.joined("prints") for recording in recordings]
    inputs = _equal_inputs(recordings)
    found: dict[tuple[int, int], Copies] = {}
    for (a, b, later), votes in _candidates(recordings, prints).most_common():
        if votes >= VOTES and (a, b) not in found:
            share = _share(prints[a], prints[b], later)
            if share >= LEAST_SHARE:
                found[a, b] = Copies(recordings[a].name, recordings[b].name, share, later, (a, b) in inputs)
    for a, b in inputs - found.keys():
        found[a, b] = Copies(recordings[a].name, recordings[b].name, 0.0, 0, True)
    return [found[pair] for pair in sorted(found)]


def _candidates(recordings: Sequence[RecordingSignals], prints: Sequence[np.ndarray]) -> Counter[tuple[int, int, int]]:
    """How many pictures two recordings have at each distance in time that are equal in half of their bits."""
    kept, owners, places = [], [], []
    for i, (recording, own) in enumerate(zip(recordings, prints, strict=True)):
        telling = (recording.joined("contrast") > CONTRAST) & (own != np.roll(own, 1))
        kept.append(own[telling])
        owners.append(np.full(telling.sum(), i))
        places.append(np.flatnonzero(telling))
    owner, place, votes = np.concatenate(owners), np.concatenate(places), Counter()
    for half in np.concatenate(kept).view(np.uint32).reshape(-1, 2).T:
        order = np.argsort(half, kind="stable")
        edges = np.concatenate([[0], np.flatnonzero(np.diff(half[order])) + 1, [len(order)]])
        for begin in np.flatnonzero(np.diff(edges) > 1):
            group = order[edges[begin] : edges[begin + 1]]
            first = {int(owner[i]): int(place[i]) for i in group[::-1]}  # of each recording the first place
            if 2 <= len(first) <= COMMON:
                votes.update((a, b, first[b] - first[a]) for a, b in combinations(sorted(first), 2))
    return votes


def _share(one: np.ndarray, other: np.ndarray, later: int) -> float:
    begin, end = max(0, -later), min(len(one), len(other) - later)
    apart = np.bitwise_count(one[begin:end] ^ other[begin + later : end + later])
    return float((apart <= NEAR_BITS).sum() / max(min(len(one), len(other)), 1))


def _equal_inputs(recordings: Sequence[RecordingSignals]) -> set[tuple[int, int]]:
    """Pairs with the same rows, of those in which something happens."""
    by_rows: dict[bytes, list[int]] = {}
    for i, recording in enumerate(recordings):
        keyboard, mouse = recording.joined("keyboard"), recording.joined("mouse_deg")
        rows = np.concatenate([keyboard, mouse.round(3)], axis=1)
        if (rows[1:] != rows[:-1]).any(axis=1).sum() >= INPUT_CHANGES:
            by_rows.setdefault(rows.tobytes(), []).append(i)
    return {pair for same in by_rows.values() for pair in combinations(same, 2)}
