"""What the keys do to the picture, against what is left of that when keys and pictures are of different moments."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.findings import Dataset, Finding
from data_pipeline.doctor.signals import Pairs
from data_pipeline.motion import EXPECTED

WINDOW_S = 0.35  # a key's effect builds up: what counts is how much of the last so many seconds it was held
APART_S = 2.0  # moments so far apart have nothing to do with each other
# Standard deviations of chance. In 5 sets of 20 clean ViZDoom recordings the weakest key had 4.6, 6 in the median; with
# the rows of another recording, one had 2.9 at most.
NONE, REVERSED, CLEAR = 3.0, -4.0, 6.0
DEAD_S = 30.0  # of play, before a key that is never held is dead
PRESSES = 10  # of a key, before its having no effect says something
CLIPPED = 0.02  # share of the largest and of the smallest motion that is cut down
MOST = 500_000  # frame pairs that are looked at


class KeyEffect(NamedTuple):
    """One key: by how many standard deviations of chance motion goes with it, the mouse and other keys taken out."""

    held: int  # frames
    presses: int
    right_px: float | None = None  # none where there is too little to tell
    down_px: float | None = None
    divergence: float | None = None

    @property
    def strongest(self) -> float | None:
        """The largest of the three, without its sign."""
        return max((abs(one) for one in self[2:] if one is not None), default=None)

    def along(self, key: str) -> float | None:
        """The effect that a key of this name should have, > 0 if it goes the right way; none for other names."""
        quantity, sign = EXPECTED.get(key, ("", 0))
        strength = getattr(self, quantity, None)
        return None if strength is None else sign * strength


def measure_keys(data: Dataset, trusted: Sequence[Pairs]) -> list[KeyEffect]:
    """How often each key is held, and its effect in the `trusted` frame pairs."""
    keyboards = [episode.keyboard for recording in data.recordings for episode in recording.episodes]
    held = np.sum([keys.sum(axis=0, dtype=np.int64) for keys in keyboards], axis=0).tolist()
    presses = np.sum([(np.diff(keys, axis=0, prepend=0) == 1).sum(axis=0) for keys in keyboards], axis=0).tolist()
    window, apart = max(round(WINDOW_S * data.game.fps), 1), round(APART_S * data.game.fps)
    if sum(len(one.motion) for one in trusted) < 10 * apart:
        return [KeyEffect(*counts) for counts in zip(held, presses, strict=True)]
    motion = np.concatenate([one.motion[:, :3] for one in trusted])[:MOST]
    keys = np.concatenate([_recent(one.keyboard, window) for one in trusted])[:MOST]
    turns = np.concatenate([one.yaw_pitch for one in trusted])[:MOST]
    motion = np.clip(motion, *np.quantile(motion, [CLIPPED, 1 - CLIPPED], axis=0))
    effects = []
    for i in range(keys.shape[1]):
        known = np.column_stack([turns, np.delete(keys, i, axis=1), np.ones(len(keys))])
        key = _residual(keys[:, i : i + 1], known)
        strength = _against_chance(_residual(motion, known), key, apart).tolist() if key.std() > 1e-6 else []
        effects.append(KeyEffect(held[i], presses[i], *strength))
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


def report_keys(data: Dataset, effects: Sequence[KeyEffect], complete: bool) -> Iterator[Finding]:
    """Keys that are dead or exchanged, and if the inputs are `complete`, those without effect."""
    names, everyone = data.game.action_space.keys, range(len(data.recordings))
    total = sum(one.frames for one in data.recordings)
    find = data.find if total >= DEAD_S * data.game.fps else data.note  # in a short time it may be chance
    along = {name: effect.along(name) for name, effect in zip(names, effects, strict=True)}
    clearest = max((strength for strength in along.values() if strength is not None), default=0.0)
    for name, effect in zip(names, effects, strict=True):
        strength = along[name] if name in EXPECTED else effect.strongest
        if effect.held == 0 and data.game.inputs.keys.get(name) != ():
            yield find("dead input", everyone, f"the key {name} is never held")
        elif effect.held == total:
            yield find("dead input", everyone, f"the key {name} is always held")
        elif complete and clearest >= CLEAR and effect.presses >= PRESSES and abs(strength or NONE) < NONE:
            what = f"the key {name} is pressed {effect.presses} times, but does nothing that can be seen"
            yield (data.find if name in EXPECTED else data.note)("no effect", everyone, what)
    for pair in (("left", "right"), ("forward", "back")):
        strengths = [strength for name in pair if (strength := along.get(name)) is not None]
        if len(strengths) == 2 and max(strengths) <= REVERSED:
            what = f"the keys {pair[0]} and {pair[1]} are exchanged: each moves the picture as the other should"
            yield data.find("swapped keys", everyone, what)
