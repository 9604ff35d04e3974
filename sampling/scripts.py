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
    path, frames = storage.path(script), scripted.frames
    if path.suffix.lower() == ".csv":
        actions = read_actions(path, action_space)
        if len(actions) < frames:
            raise UserError(
                f"{path} has {len(actions)} rows for {frames} frames; ask for frames={len(actions)} or fewer"
            )
        return actions[:frames]
    if script == "random":
        return preset_actions(random_table(action_space, scripted.mouse_deg), frames, scripted.seed)
    segments = _read_json(path) if path.suffix.lower() == ".json" else script.split(",")
    return held_segments(segments, action_space, scripted)


def held_segments(segments: list[str], action_space: ActionSpace, scripted: Scripted) -> Actions:
    """`word+word:frames` one after the other, repeated until the frames are filled."""
    words, held = presets(action_space, scripted.mouse_deg), []
    for segment in segments:
        entry, colon, count = segment.strip().partition(":")
        digits = count.strip().lstrip("0")
        if colon and not (digits.isascii() and digits.isdecimal()):
            raise UserError(f"action script {segment!r}: after the colon comes a number of frames, as in idle:36")
        frames = int(digits[:18]) if colon else SEGMENT_FRAMES
        room = scripted.frames - len(held)  # more is never seen
        held += [hold(entry, words, action_space)] * min(frames, room)
    rows = np.arange(scripted.frames) % len(held)
    keyboard = np.array([preset.keyboard for preset in held], np.float32)
    mouse = np.array([preset.mouse for preset in held], np.float32)
    return Actions(keyboard[rows], mouse[rows])


def _read_json(path: Path) -> list[str]:
    segments = parse_json(path.read_bytes(), path)
    if not (isinstance(segments, list) and segments and all(isinstance(segment, str) for segment in segments)):
        raise UserError(f'{path} must hold a list of segments, as in ["forward:36", "forward+turn_left:24"]')
    return segments
