"""Recordings spoilt in one way each: what is planted, and which fault the doctor must find."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.game import GameConfig
from data_pipeline.readers.worldloom import ABOUT, ACTIONS, VIDEO, read_actions, write_actions, write_episode
from data_pipeline.video import read_frames

FORWARD, BACK, LEFT, RIGHT = range(4)


class Tape(NamedTuple):
    """A recording in memory."""

    frames: np.ndarray  # (n h w 3) uint8
    keyboard: np.ndarray  # (n k)
    mouse_deg: np.ndarray  # (n 2) pitch, yaw


class Planted(NamedTuple):
    """A way to spoil recordings."""

    fault: str | None  # that must be found
    spoil: Callable[[Tape, Tape], Tape]  # a recording, and another one of the set
    every: int = 1  # so many recordings have one that is spoilt


def pick(tape: Tape, frames: Any = None, rows: Any = None) -> Tape:
    """Some frames with some rows, by index or slice; all without."""
    rows = slice(None) if rows is None else rows
    pictures = tape.frames if frames is None else tape.frames[frames]
    return Tape(pictures, tape.keyboard[rows], tape.mouse_deg[rows])


def plant_shift(late: int, every: int = 1) -> Planted:
    """Inputs that are `late` frames late, or early if it is below 0."""
    first, last = max(late, 0), max(-late, 0)
    frames, rows = slice(first, -last or None), slice(last, -first or None)
    return Planted("shift", lambda tape, _: pick(tape, frames, rows), every)


def plant_mouse(fault: str, factor: Any, every: int = 1) -> Planted:
    """Pitch and yaw times `factor`."""
    return Planted(fault, lambda tape, _: tape._replace(mouse_deg=tape.mouse_deg * factor), every)


def plant_key(fault: str, key: int, held: Callable[[Tape], Any]) -> Planted:
    """`key` is held when `held` of another recording says so."""

    def spoil(tape: Tape, other: Tape) -> Tape:
        keyboard = tape.keyboard.copy()
        keyboard[:, key] = held(other)
        return tape._replace(keyboard=keyboard)

    return Planted(fault, spoil)


def half(tape: Tape) -> slice:
    return slice(len(tape.frames) // 2)


def twice(tape: Tape) -> np.ndarray:
    return np.arange(len(tape.frames)) // 2 * 2


def frozen(tape: Tape, first: int, end: int) -> np.ndarray:
    numbers = np.arange(len(tape.frames))
    return np.where((numbers >= first) & (numbers < end), first, numbers)


SECOND = slice(0, -1, 2)  # every second one, as many as `half` has
PLANTED = {
    "nothing": Planted(None, lambda tape, _: tape),
    "inputs 1 late": plant_shift(1),
    "inputs 2 late": plant_shift(2),
    "inputs 5 late": plant_shift(5),
    "inputs 1 early": plant_shift(-1),
    "inputs 2 early": plant_shift(-2),
    "inputs 5 early": plant_shift(-5),
    "inputs 5 late, in every 4th": plant_shift(5, every=4),
    "half the fps: every 2nd picture left out": Planted("rate", lambda tape, _: pick(tape, SECOND, half(tape))),
    "half the fps: every 2nd row left out": Planted("rate", lambda tape, _: pick(tape, half(tape), SECOND)),
    "half the fps: every 2nd picture twice": Planted("repeats", lambda tape, _: pick(tape, frames=twice(tape))),
    "half the fps: every 2nd row twice": Planted("repeats", lambda tape, _: pick(tape, rows=twice(tape))),
    "half the fps: every 2nd of both left out": Planted("units", lambda tape, _: pick(tape, SECOND, SECOND)),
    "axes swapped": Planted("swapped axes", lambda tape, _: tape._replace(mouse_deg=tape.mouse_deg[:, ::-1])),
    "yaw inverted": plant_mouse("inverted", [1, -1]),
    "yaw inverted, in every 4th": plant_mouse("inverted", [1, -1], every=4),
    "yaw in radians": plant_mouse("units", [1, np.pi / 180]),
    "yaw counted twice": plant_mouse("units", [1, 2]),
    "another's mouse, in every 4th": Planted(
        "unrelated", lambda tape, other: tape._replace(mouse_deg=other.mouse_deg), every=4
    ),
    "dead key": plant_key("dead input", LEFT, lambda _: 0),
    "stuck key": plant_key("dead input", BACK, lambda _: 1),
    "dead mouse": plant_mouse("dead input", 0),
    "a key that is another one's": plant_key("no effect", LEFT, lambda other: other.keyboard[:, LEFT]),
    "left and right exchanged": Planted(
        "swapped keys", lambda tape, _: tape._replace(keyboard=tape.keyboard[:, [FORWARD, BACK, RIGHT, LEFT]])
    ),
    "frozen picture, in every 4th": Planted("still picture", lambda tape, _: pick(tape, frozen(tape, 20, 60)), every=4),
    "frozen inputs, in every 4th": Planted(
        "constant inputs", lambda tape, _: pick(tape, rows=frozen(tape, 10, 100)), every=4
    ),
    "black picture, in every 4th": Planted(
        "still picture", lambda tape, _: tape._replace(frames=0 * tape.frames), every=4
    ),
    "another's copy, cut, in every 4th": Planted(
        "copy", lambda _, other: pick(other, slice(10, None), slice(10, None)), every=4
    ),
}


def plant(planted: Planted, clean: Path, out: Path, game: GameConfig) -> int:
    """Writes the recordings of `clean` into `out`, and returns how many of them are spoilt."""
    folders = sorted(clean.glob("episode_*"))
    for i, folder in enumerate(folders):
        if i % planted.every:
            link_episode(folder, out / folder.name)
        else:
            tape = read_tape(folder, game)
            write_tape(planted.spoil(tape, read_tape(folders[i - 7], game)), tape, folder, out / folder.name, game)
    return len(folders[:: planted.every])


def read_tape(folder: Path, game: GameConfig) -> Tape:
    actions = read_actions(folder / ACTIONS, game.action_space)
    frames = np.stack(list(read_frames(folder / VIDEO)))
    return Tape(frames, actions.keyboard, actions.mouse * game.action_space.mouse_unit_deg)


def write_tape(tape: Tape, before: Tape, source: Path, out: Path, game: GameConfig) -> None:
    """An episode folder; the video is the `source`'s if its frames are those of `before`."""
    if tape.frames is before.frames:
        link_episode(source, out, but=ACTIONS)
        write_actions(out / ACTIONS, game.action_space, tape.keyboard, tape.mouse_deg)
    else:
        about = json.loads((source / ABOUT).read_text()) | {"frames": len(tape.frames)}
        write_episode(out, about, *tape, crf=20)


def link_episode(source: Path, out: Path, but: str = "") -> None:
    """The same episode without its file `but`."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != but:
            os.link(path, out / path.name)
