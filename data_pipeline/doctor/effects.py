"""What the keys do to the picture, against what is left of that when keys and pictures are of different moments."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from data_pipeline.doctor.findings import Case, Finding
from data_pipeline.doctor.signals import EpisodeSignals
from data_pipeline.motion import EXPECTED

WINDOW_S = 0.35  # a key's effect builds up: what counts is how much of the last so many seconds it was held
APART_S = 2.0  # moments so far apart have nothing to do with each other
MOST = 500_000  # frames that are looked at
# Standard deviations of chance. In 5 sets of 20 clean ViZDoom recordings the weakest key had 4.6, 6 in the median; with
# the rows of another recording, one had 2.9 at most.
NONE, REVERSED, CLEAR = 3.0, -4.0, 6.0
DEAD_S = 30.0  # of play, before a key that nobody holds is dead
PRESSES = 10  # of a key, before its having no effect says something
# A key is dead in one recording if so many presses are to be expected, and each of so many others has some.
EXPECTED_PRESSES, OTHERS = 12, 5
CLIPPED = 0.02  # share of the largest and of the smallest motion that counts as less


class KeyEffect(NamedTuple):
    """One key: by how many standard deviations of chance motion goes with it, the mouse and other keys taken out."""

    held: int  # frames
    presses: int
    right_px: float | None  # none where there is too little to tell
    down_px: float | None
    divergence: float | None

    @property
    def strongest(self) -> float | None:
        """The largest of the three, without its sign."""
        found = [abs(one) for one in self[2:] if one is not None]
        return max(found, default=None)


def measure_keys(case: Case, trusted: Sequence[tuple[EpisodeSignals, int]]) -> list[KeyEffect]:
    """How often each key is held, and its effect in the `trusted` episodes, whose rows are so many frames late."""
    keyboards, fps = [one.keyboard for recording in case.recordings for one in recording.episodes], case.game.fps
    held = np.sum([keys.sum(axis=0, dtype=np.int64) for keys in keyboards], axis=0)
    presses = np.sum([(np.diff(keys, axis=0, prepend=0) == 1).sum(axis=0) for keys in keyboards], axis=0)
    strength = _strength(trusted, max(round(WINDOW_S * fps), 1), round(APART_S * fps))
    rows = strength or [[None] * 3] * len(held)
    return [KeyEffect(int(i), int(j), *row) for i, j, row in zip(held, presses, rows, strict=True)]


def _strength(episodes: Sequence[tuple[EpisodeSignals, int]], window: int, apart: int) -> list[list[float | None]]:
    looks, keys, turns, frames = [], [], [], 0
    for episode, late in episodes:
        if frames > MOST or len(episode) < abs(late) + 2:
            continue
        pictures = slice(max(0, -late), len(episode) - 1 - max(0, late))
        rows = slice(pictures.start + late, pictures.stop + late)
        looks.append(episode.looks[pictures, :3])
        keys.append(_recent(episode.keyboard, window)[rows])
        turns.append(np.pad(episode.yaw_pitch[rows], ((0, 0), (0, 2)))[:, :2])
        frames += len(episode)
    if frames < 10 * apart:
        return []
    looks, keys, turns = np.concatenate(looks).astype(np.float64), np.concatenate(keys), np.concatenate(turns)
    looks = np.clip(looks, *np.quantile(looks, [CLIPPED, 1 - CLIPPED], axis=0))
    found = []
    for i in range(keys.shape[1]):
        known = np.column_stack([turns, np.delete(keys, i, axis=1), np.ones(len(keys))])
        key = _without(keys[:, i : i + 1], known)
        strength = _against_chance(_without(looks, known), key, apart).tolist()
        found.append(strength if key.std() > 1e-6 else [None] * 3)
    return found


def _recent(keyboard: np.ndarray, window: int) -> np.ndarray:
    """(n k) the share of the last `window` rows in which each key was held."""
    summed = np.cumsum(np.pad(keyboard.astype(np.float64), ((window, 0), (0, 0))), axis=0)
    return (summed[window:] - summed[:-window]) / window


def _without(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What of `values` (n c) does not follow linearly from `known` (n m)."""
    return values - known @ np.linalg.lstsq(known, values, rcond=None)[0]


def _against_chance(looks: np.ndarray, key: np.ndarray, apart: int) -> np.ndarray:
    """(c) how `looks` (n c) go with `key` (n 1), in standard deviations over shifts of `apart` frames and more."""
    spectrum = np.fft.rfft(looks, axis=0) * np.fft.rfft(key, axis=0).conj()
    together = np.fft.irfft(spectrum, n=len(looks), axis=0)
    return together[0] / (together[apart:-apart].std(axis=0) + 1e-12)


def report_keys(case: Case, effects: Sequence[KeyEffect], complete: bool) -> Iterator[Finding]:
    """Keys that are dead or each other's, and if the inputs are `complete`, those without effect."""
    names = case.game.action_space.keys
    dead = [effect.held in (0, sum(case.frames)) for effect in effects]
    along = [_along(name, effect) for name, effect in zip(names, effects, strict=True)]
    yield from _dead(case, effects)
    yield from _dead_in_one(case, [i for i, one in enumerate(dead) if not one])
    yield from _swapped(case, dict(zip(names, along, strict=True)))
    clearest = max((strength for strength in along if strength is not None), default=0.0)
    if complete and clearest >= CLEAR:
        for i, effect in enumerate(effects):
            strength = along[i] if names[i] in EXPECTED else effect.strongest
            if strength is not None and not dead[i] and effect.presses >= PRESSES and abs(strength) < NONE:
                yield _without_effect(case, names[i], effect)


def _dead(case: Case, effects: Sequence[KeyEffect]) -> Iterator[Finding]:
    """Keys that nobody holds, and those that nobody releases; in a short time, that may be chance."""
    everyone, total = range(len(case.recordings)), sum(case.frames)
    say = case.find if total >= DEAD_S * case.game.fps else case.note
    for name, effect in zip(case.game.action_space.keys, effects, strict=True):
        unbound = case.game.inputs.keys.get(name) == ()
        if effect.held == 0 and not unbound:
            remedy = "bind it, record it, or leave it out of the action space"
            yield say("dead input", everyone, (f"the key {name} is never held", remedy))
        elif effect.held == total:
            remedy = "it is stuck: mend its binding, or leave it out of the action space"
            yield say("dead input", everyone, (f"the key {name} is always held", remedy))


def _dead_in_one(case: Case, keys: Sequence[int]) -> Iterator[Finding]:
    """Those of `keys` that one recording never holds or never releases, and all others press often."""
    frames = np.array(case.frames)
    held = np.array([one.joined("keyboard").sum(axis=0, dtype=np.int64) for one in case.recordings])
    presses = np.array(
        [(np.diff(one.joined("keyboard").astype(np.int8), axis=0) > 0).sum(axis=0) for one in case.recordings]
    )
    for i, key in product(range(len(frames)), keys):
        others = np.arange(len(frames)) != i
        expected = presses[others, key].sum() / max(frames[others].sum(), 1) * frames[i]
        if others.sum() >= OTHERS and presses[others, key].all() and expected >= EXPECTED_PRESSES:
            name, often = case.game.action_space.keys[key], f"where others press it {expected:.0f} times"
            if held[i, key] in (0, frames[i]):
                how = "never held" if held[i, key] == 0 else "always held"
                yield case.find(
                    "dead input", [i], (f"the key {name} is {how}, {often}", "its log is broken: leave it out")
                )


def _swapped(case: Case, along: Mapping[str, float | None]) -> Iterator[Finding]:
    """Pairs of keys that move the picture as the other one should."""
    for pair in (("left", "right"), ("forward", "back")):
        strengths = [strength for name in pair if (strength := along.get(name)) is not None]
        if len(strengths) == 2 and max(strengths) <= REVERSED:
            what = f"the keys {pair[0]} and {pair[1]} are each other's: each moves the picture as the other should"
            remedy = "exchange them in the inputs or in game.inputs.keys"
            yield case.find("swapped keys", range(len(case.recordings)), (what, remedy))


def _without_effect(case: Case, name: str, effect: KeyEffect) -> Finding:
    """Of a key whose effect is known something is wrong; of others, perhaps."""
    what = f"the key {name} is pressed {effect.presses} times, but does nothing that can be seen"
    if name in EXPECTED:
        remedy = "other keys do, so these rows are not that key's: mend its binding"
        return case.find("no effect", range(len(case.recordings)), (what, remedy))
    return case.note("no effect", range(len(case.recordings)), (what, "if it should, mend its binding"))


def _along(name: str, effect: KeyEffect) -> float | None:
    """The effect that is expected of a key of this name, above 0 if it goes the right way; none for other names."""
    quantity, sign = EXPECTED.get(name, (None, 0))
    strength = getattr(effect, quantity) if quantity else None
    return None if strength is None else sign * strength
