"""Action scripts: what to press during a rollout, as words, a file, or chance."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from data_pipeline.readers.worldloom import read_actions
from data_pipeline.types import Actions, ActionSpace

SEGMENT_FRAMES = 12  # how long `random` and a segment without a number hold one entry (Matrix-Game 2.0's sampler)
TURNS = {"turn_left": (0, -1), "turn_right": (0, 1), "look_up": (1, 0), "look_down": (-1, 0)}  # (pitch, yaw)

# How often `random` presses what, in a space that has these four keys. Back is rare, as in play; standing still is not
# absent, so that a turn is also seen alone. No looking up or down: without the way back it ends in the sky.
MOVES = {
    (): 2,
    ("forward",): 5,
    ("forward", "left"): 2,
    ("forward", "right"): 2,
    ("left",): 2,
    ("right",): 2,
    ("back",): 1,
}
RANDOM_TURNS = {None: 4, "turn_left": 3, "turn_right": 3}


@dataclass(frozen=True)
class Scripted:
    """How a script becomes actions."""

    frames: int  # rows wanted
    seed: int = 0  # of `random`
    mouse_deg: float = 3.0  # degrees per frame of turn_left, look_up, ...

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, not {self.frames}")


def read_script(script: str, action_space: ActionSpace, scripted: Scripted) -> Actions:
    """The actions, one row per frame, that `script` stands for.

    `random`; presets such as `forward`, `turn_left`, `idle`, joined with `+` and held for frames after `:`, one after
    the other (`forward+turn_left:36,idle:12`, from the beginning again until the frames are filled); a CSV file in the
    format of a recording's actions.csv; a JSON file with a list of such words.
    """
    path = Path(script)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, action_space, scripted.frames)
    if path.suffix.lower() == ".json":
        return held_segments(_read_json(path), action_space, scripted)
    if script == "random":
        return random_actions(action_space, scripted)
    return held_segments(script.split(","), action_space, scripted)


def presets(action_space: ActionSpace, mouse_deg: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every word of a script with its keyboard (k) and mouse (2) vector: idle, the turns of the mouse, the keys."""
    still = np.zeros(len(action_space.keys), np.float32)
    rest = np.zeros(2 if action_space.mouse else 0, np.float32)
    words = {"idle": (still, rest)}
    if action_space.mouse:
        units = np.float32(mouse_deg / action_space.mouse_unit_deg)
        words |= {name: (still, np.array(turn, np.float32) * units) for name, turn in TURNS.items()}
    return words | {
        key: (row, rest) for key, row in zip(action_space.keys, np.eye(len(still), dtype=np.float32), strict=True)
    }


def held_segments(segments: list[str], action_space: ActionSpace, scripted: Scripted) -> Actions:
    """`word+word:frames` one after the other, repeated until the frames are filled."""
    words = presets(action_space, scripted.mouse_deg)
    keyboard, mouse = [], []
    for segment in segments:
        held, colon, count = segment.strip().partition(":")
        if colon and not (count.strip().isdecimal() and int(count) > 0):
            raise ValueError(f"action script {segment!r}: after the colon comes a number of frames, as in idle:36")
        keys, turn = _together([word.strip() for word in held.split("+")], words, action_space)
        frames = int(count) if colon else SEGMENT_FRAMES
        keyboard.append(np.tile(keys, (frames, 1)))
        mouse.append(np.tile(turn, (frames, 1)))
    return _repeat(Actions(np.concatenate(keyboard), np.concatenate(mouse)), scripted.frames)


def random_actions(action_space: ActionSpace, scripted: Scripted) -> Actions:
    """Held segments of 12 frames, each a weighted draw of keys and a turn of half to all of `mouse_deg`, by seed."""
    generator = torch.Generator().manual_seed(scripted.seed)
    words = presets(action_space, scripted.mouse_deg)
    moves = {held: weight for held, weight in MOVES.items() if set(held) <= set(action_space.keys)}
    if "forward" in action_space.keys:
        moves |= {(key,): 1 for key in action_space.keys if (key,) not in moves}
    else:
        moves = {(key,): 1 for key in action_space.keys}
    turns = RANDOM_TURNS if action_space.mouse else {None: 1}
    keyboard, mouse = [], []
    for _ in range(0, scripted.frames, SEGMENT_FRAMES):
        held, turn = _draw(moves, generator), _draw(turns, generator)
        amount = 0.5 + 0.5 * torch.rand((), generator=generator).item()
        rows = _together([*(held or ("idle",)), *([turn] if turn else [])], words, action_space)
        keyboard.append(np.tile(rows[0], (SEGMENT_FRAMES, 1)))
        mouse.append(np.tile(rows[1] * np.float32(amount), (SEGMENT_FRAMES, 1)))
    return _repeat(Actions(np.concatenate(keyboard), np.concatenate(mouse)), scripted.frames)


T = TypeVar("T")


def _draw(weights: Mapping[T, float], generator: torch.Generator) -> T:
    chances = torch.tensor(list(weights.values()), dtype=torch.float64)
    return list(weights)[int(torch.multinomial(chances, 1, generator=generator))]


Held = tuple[np.ndarray, np.ndarray]


def _together(held: list[str], words: Mapping[str, Held], action_space: ActionSpace) -> Held:
    """The keyboard and mouse vectors of several words at once."""
    for word in held:
        if word not in words:
            near = difflib.get_close_matches(word, [*words, "random"], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: random, {', '.join(words)}, or a .csv file"
            raise ValueError(f"no key or preset {word!r} in the action space {action_space.name!r}; {hint}")
    keyboards, mice = zip(*(words[word] for word in held), strict=True)
    return np.maximum.reduce(keyboards), np.add.reduce(mice)


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
