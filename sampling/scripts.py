"""Action scripts: what to press during a rollout, as words, a file, or chance."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline import storage
from data_pipeline.readers.worldloom import read_actions
from data_pipeline.types import Actions, ActionSpace
from sampling.presets import MOUSE_DEG, SEGMENT_FRAMES, hold, preset_actions, presets, random_table


@dataclass(frozen=True)
class Scripted:
    """How a script becomes actions."""

    frames: int  # rows wanted
    seed: int = 0  # of `random`
    mouse_deg: float = MOUSE_DEG  # degrees per frame of turn_left, look_up, ...

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, not {self.frames}")


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
        if colon and not (count.strip().isdecimal() and int(count) > 0):
            raise ValueError(f"action script {segment!r}: after the colon comes a number of frames, as in idle:36")
        held, frames = hold(entry, words, action_space), int(count) if colon else SEGMENT_FRAMES
        keyboard += [held.keyboard] * frames
        mouse += [held.mouse] * frames
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
        raise ValueError(f"{path} has {len(actions)} rows for {frames} frames; ask for frames={len(actions)} or fewer")
    return actions[:frames]


def _read_json(path: Path) -> list[str]:
    try:
        segments = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not (isinstance(segments, list) and segments and all(isinstance(segment, str) for segment in segments)):
        raise ValueError(f'{path} must hold a list of segments, as in ["forward:36", "forward+turn_left:24"]')
    return segments
