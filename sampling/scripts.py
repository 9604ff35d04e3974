"""Action scripts: what to press during a rollout, as words, a file, or chance."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.foreign import parse_json
from configs.game import ActionSpace
from data_pipeline.readers.worldloom import read_actions
from data_pipeline.types import Actions
from sampling.presets import MOUSE_DEG, SEGMENT_FRAMES, hold, preset_actions, presets, random_table

MOST_FRAMES = 1_000_000  # of one video: 16 hours at 17.5 frames/s
MOST_DEG = 3600.0  # ten turns a frame: nothing turns faster, and float32 has room


@dataclass(frozen=True)
class Scripted:
    """How a script becomes actions."""

    frames: int  # rows wanted
    seed: int = 0  # of `random`
    mouse_deg: float = MOUSE_DEG  # degrees per frame of turn_left, look_up, ...

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MOST_FRAMES:
            raise UserError(f"frames={self.frames} must be from 1 to {MOST_FRAMES}")
        if not abs(self.mouse_deg) <= MOST_DEG:
            raise UserError(
                f"mouse_deg={self.mouse_deg:g} must be from {-MOST_DEG:g} to {MOST_DEG:g} degrees per frame"
            )


def is_file(script: str) -> bool:
    """Whether `script` is the name of a file, not words."""
    return Path(script).suffix.lower() in (".csv", ".json")


def read_script(script: str, action_space: ActionSpace, scripted: Scripted) -> Actions:
    """The actions, one row per frame, that `script` stands for.

    `random`; presets such as `forward`, `turn_left`, `idle`, joined with `+` and held for frames after `:`, one after
    the other (`forward+turn_left:36,idle:12`, from the beginning again until the frames are filled); a CSV file in the
    format of a recording's actions.csv; a JSON file with a list of such words.
    """
    path = storage.path(script)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, action_space, scripted.frames)
    if path.suffix.lower() == ".json":
        return held_segments(_read_json(path), action_space, scripted)
    if script == "random":
        return random_actions(action_space, scripted)
    return held_segments(script.split(","), action_space, scripted)


def held_segments(segments: list[str], action_space: ActionSpace, scripted: Scripted) -> Actions:
    """`word+word:frames` one after the other, repeated until the frames are filled."""
    words = presets(action_space, scripted.mouse_deg)
    keyboard, mouse = [], []
    for segment in segments:
        entry, colon, count = segment.strip().partition(":")
        digits = count.strip().lstrip("0")
        if colon and not (digits.isascii() and digits.isdecimal()):
            raise UserError(f"action script {segment!r}: after the colon comes a number of frames, as in idle:36")
        held, frames = hold(entry, words, action_space), int(digits[:18]) if colon else SEGMENT_FRAMES
        room = scripted.frames - len(keyboard)  # more is never seen
        keyboard += [held.keyboard] * min(frames, room)
        mouse += [held.mouse] * min(frames, room)
    return _repeat(Actions(np.array(keyboard, np.float32), np.array(mouse, np.float32)), scripted.frames)


def random_actions(action_space: ActionSpace, scripted: Scripted) -> Actions:
    """Play drawn by seed from the action space's table: one entry in the first frame, then one per 12 frames."""
    return preset_actions(random_table(action_space, scripted.mouse_deg), scripted.frames, scripted.seed)


def _repeat(actions: Actions, frames: int) -> Actions:
    rows = np.arange(frames) % len(actions)
    return Actions(actions.keyboard[rows], actions.mouse[rows])


def _read_csv(path: Path, action_space: ActionSpace, frames: int) -> Actions:
    actions = read_actions(path, action_space)
    if len(actions) < frames:
        raise UserError(f"{path} has {len(actions)} rows for {frames} frames; ask for frames={len(actions)} or fewer")
    return actions[:frames]


def _read_json(path: Path) -> list[str]:
    segments = parse_json(path.read_bytes(), path)
    if not (isinstance(segments, list) and segments and all(isinstance(segment, str) for segment in segments)):
        raise UserError(f'{path} must hold a list of segments, as in ["forward:36", "forward+turn_left:24"]')
    return segments
