"""Findings that need no alignment: repeated pictures, copies, black and cropped ones, short episodes."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from data_pipeline.doctor.findings import Dataset, Finding
from data_pipeline.doctor.signals import RecordingSignals
from data_pipeline.readers import KEPT_WELL
from data_pipeline.video import kept_share

REPEATED = 0.1  # of the largest change near by: less is the same picture again
NEAR = 4  # frame pairs before and after
MOVING = 1.0  # of 255, the mean difference between two pictures from which something moves
REPEATS_SHARE = 0.15  # of pictures; the worst of 500 clean ViZDoom recordings had 0.09, 24 in 30 fps have 0.2
INPUT_CHANGES = 20  # in an episode, before it is judged at which rows they come
UNCHANGED, UNCHANGED_SHARE = 0.3, 0.95  # of 255, and of the pictures: a black or frozen capture
KEPT_LEAST = 0.5  # of the picture: what is cropped further is another view
CONTRAST = 8.0  # of 255: pictures below look all alike (black, fog, a fade)
LEAST_SHARE = 0.5  # of the shorter recording's pictures that two have in common
COMMON = 50  # recordings with the same picture: then it is a menu or a loading screen
VOTES = 3  # equal pictures at one distance in time before two recordings are compared
NEAR_BITS = 10  # of the 64 of a hash that may differ; of unrelated pictures, 20 and more do


def find_repeats(data: Dataset) -> tuple[list[Finding], np.ndarray]:
    """Findings of repeated pictures or rows, and a picture that never changes; and for how many frames a picture or row
    stays the same in each recording (r)."""
    fps, findings, still = data.game.fps, [], []
    shares = np.array([_repeated_share(recording, fps) for recording in data.recordings])
    periods = np.array([_input_period(recording) for recording in data.recordings])
    if shares.any():
        share = float(np.median(shares[shares > 0]))
        what = f"{share:.0%} of the moving pictures are the one before again: {(1 - share) * fps:.3g} a second are new"
        findings.append(data.find("repeats", np.flatnonzero(shares), what))
    for period in np.unique(periods[periods > 1]).tolist():
        what = f"{period} rows of inputs in a row are always alike: they are logged {fps / period:.3g} times a second"
        findings.append(data.find("repeats", np.flatnonzero(periods == period), what))
    for i, recording in enumerate(data.recordings):
        unchanged = recording.joined("motion")[:, 3] < UNCHANGED
        still += [i] if len(unchanged) >= fps and unchanged.mean() >= UNCHANGED_SHARE else []
    if still:
        findings.append(data.find("still picture", still, "the picture never changes: black or frozen"))
    return findings, np.maximum(1 / (1 - shares), periods)


def _repeated_share(recording: RecordingSignals, fps: float) -> float:
    """The share of pictures that are the one before again, where something moves near by; 0 if they are few."""
    repeated = others = 0
    for change in [episode.motion[:, 3] for episode in recording.episodes if len(episode) > 1]:  # between neighbours
        largest = sliding_window_view(np.pad(change, NEAR), 2 * NEAR + 1).max(axis=1)
        moving, alike = largest > MOVING, change < REPEATED * np.maximum(largest, MOVING)
        for begin, end in runs(alike):
            if end - begin > NEAR:  # it stands still, though near the ends something moves
                moving[begin:end] = False
        repeated, others = repeated + (moving & alike).sum(), others + (moving & ~alike).sum()
    share = repeated / max(repeated + others, 1)
    return float(share) if others and share >= REPEATS_SHARE and repeated >= fps / 2 else 0.0


def _input_period(recording: RecordingSignals) -> int:
    """Of how many rows in a row only the first may differ, all along; 0 if there are too few changes to tell."""
    period = 0
    for episode in recording.episodes:
        rows = np.column_stack([episode.keyboard, episode.yaw_pitch])
        changing = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1))
        if len(changing) > INPUT_CHANGES:
            period = int(np.gcd.reduce(np.diff(changing), initial=period))
    return period


def runs(wanted: np.ndarray) -> list[list[int]]:
    """First and one past the last index of each run of true values."""
    return np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0)).reshape(-1, 2).tolist()


def report_files(data: Dataset, clip_frames: int) -> Iterator[Finding]:
    """Findings of pictures that are shown otherwise than they are stored, cropped sizes, and short episodes."""
    changed, sizes, short = defaultdict(list), defaultdict(list), []
    for i, recording in enumerate(data.recordings):
        changed[recording.changes].append(i)
        sizes[recording.size].append(i)
        short += [(i, len(episode)) for episode in recording.episodes if len(episode) < clip_frames]
    for changes in sorted(changed.keys() - {""}):
        what = f"stored pictures are {changes}, as players show them"
        yield data.find("shown otherwise", changed[changes], what, harmful=False)
    for (h, w), numbers in sorted(sizes.items()):
        share = kept_share((h, w), data.game.height, data.game.width)
        if share < KEPT_WELL:
            what = f"{share:.0%} of the picture is kept: {h}x{w} px become {data.game.height}x{data.game.width}"
            yield data.find("cropped", numbers, what, harmful=share < KEPT_LEAST)
    if short:
        episodes = sum(len(recording.episodes) for recording in data.recordings)
        frames = f"{len(short)} of {episodes} episodes ({sum(frames for _, frames in short)} frames)"
        yield data.find(
            "short", dict(short), f"{frames} are shorter than a clip of {clip_frames} frames", harmful=False
        )


def find_copies(data: Dataset) -> Iterator[Finding]:
    """Pairs that have half of the shorter one's pictures in common; each recording is named as a copy once."""
    hashes, copies = [recording.joined("hashes") for recording in data.recordings], set()
    for (a, b, later), votes in _candidates(data, hashes).most_common():
        if votes < VOTES or b in copies:
            continue
        begin, end = max(0, -later), min(len(hashes[a]), len(hashes[b]) - later)
        differing = np.bitwise_count(hashes[a][begin:end] ^ hashes[b][begin + later : end + later])
        share = (differing <= NEAR_BITS).sum() / min(len(hashes[a]), len(hashes[b]))
        if share >= LEAST_SHARE:
            copies.add(b)
            what = f"the same recording, or nearly: {share:.0%} of the pictures, {abs(later)} frames apart"
            yield data.find("copy", [a, b], what)


def _candidates(data: Dataset, hashes: list[np.ndarray]) -> Counter[tuple[int, int, int]]:
    """How many pictures two recordings have at each distance in time whose hashes are equal in one half."""
    frames = [
        np.flatnonzero((recording.joined("contrast") > CONTRAST) & (pictures != np.roll(pictures, 1)))
        for recording, pictures in zip(data.recordings, hashes, strict=True)
    ]
    owner, frame = np.repeat(np.arange(len(frames)), list(map(len, frames))), np.concatenate(frames)
    kept = np.concatenate([pictures[chosen] for pictures, chosen in zip(hashes, frames, strict=True)])
    votes: Counter[tuple[int, int, int]] = Counter()
    for half in kept.view(np.uint32).reshape(-1, 2).T:
        order = np.argsort(half, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(half[order])) + 1):
            first = {int(owner[i]): int(frame[i]) for i in group[::-1]}  # of each recording the first one
            if 2 <= len(first) <= COMMON:
                votes.update((a, b, first[b] - first[a]) for a, b in combinations(sorted(first), 2))
    return votes
