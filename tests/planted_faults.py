"""Recordings spoilt in one way each: what is planted, and which fault the doctor must find."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.game import GameConfig
from data_pipeline.readers.worldloom import ABOUT, ACTIONS, VIDEO, read_actions, write_actions, write_episode
from data_pipeline.video import read_frames

YAW, PITCH = 1, 0
FORWARD, BACK, LEFT, RIGHT = range(4)


@dataclass(frozen=True)
class Tape:
    """A recording in memory."""

    frames: np.ndarray  # (n h w 3) uint8
    keyboard: np.ndarray  # (n k)
    mouse_deg: np.ndarray  # (n 2) pitch, yaw


Spoil = Callable[[Tape, Tape], Tape]  # a recording, and another one of the set


@dataclass(frozen=True)
class Planted:
    """A way to spoil recordings."""

    fault: str | None  # that must be found
    spoil: Spoil
    every: int = 1  # each so manieth recording is spoilt


Indices = Callable[[int], slice | np.ndarray]  # of n frames or rows


def picking(frames: Indices | None = None, rows: Indices | None = None) -> Spoil:
    """Some of the frames with some of the rows; all without."""

    def spoil(tape: Tape, _: Tape) -> Tape:
        n = len(tape.frames)
        pictures, kept = tape.frames[frames(n)] if frames else tape.frames, rows(n) if rows else slice(None)
        return Tape(pictures, tape.keyboard[kept], tape.mouse_deg[kept])

    return spoil


def late(frames: int) -> Spoil:
    """Inputs that are so many frames late, or early if it is below 0."""
    first, last = max(frames, 0), max(-frames, 0)
    return picking(lambda n: slice(first, n - last), lambda n: slice(last, n - first))


def every_second(n: int) -> slice:
    return slice(None, n // 2 * 2, 2)


def first_half(n: int) -> slice:
    return slice(None, n // 2)


def each_twice(n: int) -> np.ndarray:
    return np.arange(n) // 2 * 2


def frozen(first: int, end: int) -> Indices:
    return lambda n: np.where((np.arange(n) >= first) & (np.arange(n) < end), first, np.arange(n))


def turning(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Another mouse."""
    return lambda tape, _: Tape(tape.frames, tape.keyboard, change(tape.mouse_deg))


def pressing(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Spoil:
    """Other keys, made of these and another recording's."""
    return lambda tape, other: Tape(tape.frames, change(tape.keyboard, other.keyboard), tape.mouse_deg)


def with_column(keyboard: np.ndarray, key: int, held: np.ndarray | int) -> np.ndarray:
    """The keyboard with another column for `key`."""
    changed = keyboard.copy()
    changed[:, key] = held
    return changed


PLANTED = {
    "nothing": Planted(None, lambda tape, _: tape),
    "inputs 1 late": Planted("shift", late(1)),
    "inputs 2 late": Planted("shift", late(2)),
    "inputs 5 late": Planted("shift", late(5)),
    "inputs 1 early": Planted("shift", late(-1)),
    "inputs 2 early": Planted("shift", late(-2)),
    "inputs 5 early": Planted("shift", late(-5)),
    "inputs 5 late, in every 4th": Planted("shift", late(5), every=4),
    "half the fps: every 2nd picture left out": Planted("rate", picking(every_second, first_half)),
    "half the fps: every 2nd row left out": Planted("rate", picking(first_half, every_second)),
    "half the fps: every 2nd picture twice": Planted("repeats", picking(frames=each_twice)),
    "half the fps: every 2nd row twice": Planted("repeats", picking(rows=each_twice)),
    "half the fps: every 2nd of both left out": Planted("units", picking(every_second, every_second)),
    "axes swapped": Planted("swapped axes", turning(lambda mouse: mouse[:, ::-1])),
    "yaw inverted": Planted("inverted", turning(lambda mouse: mouse * [1, -1])),
    "yaw inverted, in every 4th": Planted("inverted", turning(lambda mouse: mouse * [1, -1]), every=4),
    "yaw in radians": Planted("units", turning(lambda mouse: mouse * [1, np.pi / 180])),
    "yaw counted twice": Planted("units", turning(lambda mouse: mouse * [1, 2])),
    "another's mouse, in every 4th": Planted(
        "unrelated", lambda tape, other: Tape(tape.frames, tape.keyboard, other.mouse_deg), every=4
    ),
    "dead key": Planted("dead input", pressing(lambda keys, _: with_column(keys, LEFT, 0))),
    "stuck key": Planted("dead input", pressing(lambda keys, _: with_column(keys, BACK, 1))),
    "dead mouse": Planted("dead input", turning(lambda mouse: 0 * mouse)),
    "a key that is another one's": Planted(
        "no effect", pressing(lambda keys, other: with_column(keys, LEFT, other[:, LEFT]))
    ),
    "left and right exchanged": Planted(
        "swapped keys", pressing(lambda keys, _: keys[:, [FORWARD, BACK, RIGHT, LEFT]])
    ),
    "frozen picture, in every 4th": Planted("still picture", picking(frames=frozen(20, 60)), every=4),
    "frozen inputs, in every 4th": Planted("constant inputs", picking(rows=frozen(10, 100)), every=4),
    "black picture, in every 4th": Planted(
        "still picture", lambda tape, _: Tape(0 * tape.frames, tape.keyboard, tape.mouse_deg), every=4
    ),
    "another's copy, cut, in every 4th": Planted(
        "copy", lambda _, other: Tape(other.frames[10:], other.keyboard[10:], other.mouse_deg[10:]), every=4
    ),
}  # fmt: skip


def plant(planted: Planted, clean: Path, out: Path, game: GameConfig) -> list[str]:
    """Writes the recordings of `clean`, spoilt, into `out`; the names of those that are."""
    folders = sorted(clean.glob("episode_*"))
    spoilt = []
    for i, folder in enumerate(folders):
        if i % planted.every:
            link_episode(folder, out / folder.name)
        else:
            tape = read_tape(folder, game)
            write_tape(planted.spoil(tape, read_tape(folders[i - 7], game)), tape, folder, out / folder.name, game)
            spoilt.append(folder.name)
    return spoilt


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
        write_episode(out, about, tape.frames, tape.keyboard, tape.mouse_deg, crf=20)


def link_episode(source: Path, out: Path, but: str = "") -> None:
    """The same episode without its file `but`."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != but:
            os.link(path, out / path.name)
