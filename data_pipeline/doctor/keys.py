"""What the keys do to the picture, compared with chance: keys and pictures of different moments."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.findings import Dataset, Finding
from data_pipeline.doctor.signals import EpisodeSignals
from data_pipeline.motion import EXPECTED

WINDOW_S = 0.35  # a key's effect builds up: what counts is the share of this time in which it was held
APART_S = 2.0  # between moments that have nothing to do with each other
# Standard deviations of chance. In 5 sets of 20 clean ViZDoom recordings the weakest key had 4.6, 6 in the median; with
# the rows of another recording, one had 2.9 at most.
NONE, REVERSED, CLEAR = 3.0, -4.0, 6.0
DEAD_S = 30.0  # of play, before a key that is never held is dead
PRESSES = 10  # of a key, before its having no effect says something
CLIPPED = 0.02  # share of the largest and of the smallest motion that is cut down
MOST = 500_000  # frame pairs that are looked at


class KeyEffect(NamedTuple):
    """The motion that goes with one key, in standard deviations of chance, without what the mouse and other keys do."""

    held: int  # frames
    presses: int
    right_px: float | None = None  # none where there is too little to tell
    down_px: float | None = None
    divergence: float | None = None


def measure_keys(data: Dataset, trusted: Sequence[EpisodeSignals]) -> dict[str, KeyEffect]:
    """How often each key is held, and its effect in the frame pairs of `trusted` episodes."""
    keyboards = [episode.keyboard for recording in data.recordings for episode in recording.episodes]
    frames = np.sum([keys.sum(axis=0, dtype=np.int64) for keys in keyboards], axis=0).tolist()
    presses = np.sum([(np.diff(keys, axis=0, prepend=0) == 1).sum(axis=0) for keys in keyboards], axis=0).tolist()
    effects = dict(zip(data.game.action_space.keys, map(KeyEffect, frames, presses), strict=True))
    window, apart = max(round(WINDOW_S * data.game.fps), 1), round(APART_S * data.game.fps)
    if sum(len(it.motion) for it in trusted) < 10 * apart:
        return effects
    parts = [np.column_stack([it.motion[:, :3], it.yaw_pitch, _recent(it.keyboard, window)]) for it in trusted]
    motion, turns, keys = np.split(np.concatenate(parts)[:MOST], [3, 5], axis=1)
    motion = np.clip(motion, *np.quantile(motion, [CLIPPED, 1 - CLIPPED], axis=0))
    for i, (name, effect) in enumerate(effects.items()):
        others = np.column_stack([turns, np.delete(keys, i, axis=1), np.ones(len(keys))])
        key = _residual(keys[:, i : i + 1], others)
        if key.std() > 1e-6:
            effects[name] = KeyEffect(*effect[:2], *_against_chance(_residual(motion, others), key, apart).tolist())
    return effects


def _recent(keyboard: np.ndarray, window: int) -> np.ndarray:
    """(n k) the share of the last `window` rows in which each key was held."""
    summed = np.cumsum(np.pad(keyboard.astype(np.float64), ((window, 0), (0, 0))), axis=0)
    return (summed[window:] - summed[:-window]) / window


def _residual(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What of `values` (n c) does not follow linearly from `known` (n m)."""
    return values - known @ np.linalg.lstsq(known, values, rcond=None)[0]


def _against_chance(motion: np.ndarray, key: np.ndarray, apart: int) -> np.ndarray:
    """(c) how `motion` (n c) goes with `key` (n 1), in standard deviations over shifts of `apart` frames and more."""
    spectrum = np.fft.rfft(motion, axis=0) * np.fft.rfft(key, axis=0).conj()
    together = np.fft.irfft(spectrum, n=len(motion), axis=0)
    return together[0] / (together[apart:-apart].std(axis=0) + 1e-12)


def report_keys(data: Dataset, effects: dict[str, KeyEffect], complete: bool) -> Iterator[Finding]:
    """Keys that are dead or exchanged, and if the inputs are `complete`, those without effect."""
    everyone, total = range(len(data.recordings)), sum(recording.frames for recording in data.recordings)
    long = total >= DEAD_S * data.game.fps  # in a short time it may be chance
    measured = {name: effect for name, effect in effects.items() if effect.right_px is not None}
    # What a key of a known name should do, > 0 if it goes the right way.
    along = {name: sign * getattr(measured[name], axis) for name, (axis, sign) in EXPECTED.items() if name in measured}
    clear = max(along.values(), default=0.0) >= CLEAR
    for name, effect in effects.items():
        if effect.held == 0 and data.game.inputs.keys.get(name) != ():
            yield data.find("dead input", everyone, f"the key {name} is never held", harmful=long)
        elif effect.held == total:
            yield data.find("dead input", everyone, f"the key {name} is always held", harmful=long)
        elif complete and clear and effect.presses >= PRESSES and name in measured:
            strength = along[name] if name in along else max(abs(value or 0.0) for value in effect[2:])
            if abs(strength) < NONE:
                what = f"the key {name} is pressed {effect.presses} times, but does nothing that can be seen"
                yield data.find("no effect", everyone, what, harmful=name in EXPECTED)
    for first, second in (("left", "right"), ("forward", "back")):
        if max(along.get(first, 0.0), along.get(second, 0.0)) <= REVERSED:
            what = f"the keys {first} and {second} are exchanged: each moves the picture as the other should"
            yield data.find("swapped keys", everyone, what)
