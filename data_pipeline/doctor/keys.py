"""What the keys do to the picture, compared with chance: keys and pictures of different moments."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.findings import Dataset, Finding
from data_pipeline.doctor.signals import Pairs
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

    @property
    def strongest(self) -> float | None:
        """The largest of the three, without its sign."""
        return max((abs(effect) for effect in self[2:] if effect is not None), default=None)

    def along(self, key: str) -> float | None:
        """The effect that a key of this name should have, > 0 if it goes the right way; none for other names."""
        quantity, sign = EXPECTED.get(key, ("", 0))
        strength = getattr(self, quantity, None)
        return None if strength is None else sign * strength


def measure_keys(data: Dataset, trusted: Sequence[Pairs]) -> dict[str, KeyEffect]:
    """How often each key is held, and its effect in the `trusted` frame pairs."""
    keyboards = [episode.keyboard for recording in data.recordings for episode in recording.episodes]
    held = np.sum([keys.sum(axis=0, dtype=np.int64) for keys in keyboards], axis=0)
    presses = np.sum([(np.diff(keys, axis=0, prepend=0) == 1).sum(axis=0) for keys in keyboards], axis=0)
    counts = np.stack([held, presses], axis=1).tolist()
    names, window = data.game.action_space.keys, max(round(WINDOW_S * data.game.fps), 1)
    apart = round(APART_S * data.game.fps)
    if sum(len(pairs.motion) for pairs in trusted) < 10 * apart:
        return {name: KeyEffect(*count) for name, count in zip(names, counts, strict=True)}
    motion = np.concatenate([pairs.motion[:, :3] for pairs in trusted])[:MOST]
    keys = np.concatenate([_recent(pairs.keyboard, window) for pairs in trusted])[:MOST]
    turns = np.concatenate([pairs.yaw_pitch for pairs in trusted])[:MOST]
    motion, effects = np.clip(motion, *np.quantile(motion, [CLIPPED, 1 - CLIPPED], axis=0)), {}
    for i, name in enumerate(names):
        known = np.column_stack([turns, np.delete(keys, i, axis=1), np.ones(len(keys))])
        key = _residual(keys[:, i : i + 1], known)
        strength = _against_chance(_residual(motion, known), key, apart).tolist() if key.std() > 1e-6 else []
        effects[name] = KeyEffect(*counts[i], *strength)
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
    find = data.find if total >= DEAD_S * data.game.fps else data.note  # in a short time it may be chance
    along = {name: strength for name, effect in effects.items() if (strength := effect.along(name)) is not None}
    clear = max(along.values(), default=0.0) >= CLEAR
    for name, effect in effects.items():
        strength = along.get(name) if name in EXPECTED else effect.strongest
        if effect.held == 0 and data.game.inputs.keys.get(name) != ():
            yield find("dead input", everyone, f"the key {name} is never held")
        elif effect.held == total:
            yield find("dead input", everyone, f"the key {name} is always held")
        elif complete and clear and effect.presses >= PRESSES and abs(strength or NONE) < NONE:
            what = f"the key {name} is pressed {effect.presses} times, but does nothing that can be seen"
            yield (data.find if name in EXPECTED else data.note)("no effect", everyone, what)
    for first, second in (("left", "right"), ("forward", "back")):
        if max(along.get(first, 0.0), along.get(second, 0.0)) <= REVERSED:
            what = f"the keys {first} and {second} are exchanged: each moves the picture as the other should"
            yield data.find("swapped keys", everyone, what)
