"""Action scripts: what to press during a rollout, as words, a file, or random play."""

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.game import ActionSpace
from configs.untrusted import parse_json
from data_pipeline.readers.worldloom import read_actions
from data_pipeline.types import Actions
from model.limits import require_between

SEGMENT_FRAMES = 12  # how long a word is held (Matrix-Game 2.0's sampler)
MOUSE_DEG = 3.0  # degrees per frame of turn_left, look_up, ...
TURNS = {"turn_left": (0, -1), "turn_right": (0, 1), "look_up": (1, 0), "look_down": (-1, 0)}  # (pitch, yaw)
SIDES, DIAGONALS, YAWS = ["left", "right"], ["forward+left", "forward+right"], ["turn_left", "turn_right"]

# What upstream draws from in its games, in its order: never back in universal, never up or down.
UPSTREAM_TABLES = {
    "universal": [
        *DIAGONALS * 5, *YAWS * 5, *["forward", *SIDES] * 5,
        *(f"{move}+{turn}" for move in ("forward", *SIDES, *DIAGONALS) for turn in YAWS),
    ],
    "gta_drive": [
        *YAWS * 2, *["forward", "back"] * 2, *(f"{move}+{turn}" for move in ("forward", "back") for turn in YAWS)
    ],
    "templerun": ["jump", "slide", "leftside", "rightside", "turnleft", "turnright", "nomove"],
}  # fmt: skip

# The table of every other game, as how often each entry is there: moves of those keys that it has, each with each turn.
# Back is rare, as in play; standing still is not absent, so that a turn is also seen alone. No looking up or down:
# without the way back it ends in the sky.
MOVES = {"idle": 2, "forward": 5, "forward+left": 2, "forward+right": 2, "left": 2, "right": 2, "back": 1}
RANDOM_TURNS = {"idle": 4, "turn_left": 3, "turn_right": 3}


@dataclass(frozen=True)
class Scripted:
    """How a script becomes actions."""

    frames: int  # rows wanted
    seed: int = 0  # of `random`
    mouse_deg: float = MOUSE_DEG  # degrees per frame of turn_left, look_up, ...

    def __post_init__(self) -> None:
        require_between("", 1, 1_000_000, frames=self.frames)  # 16 hours at 17.5 frames/s
        require_between("", -3600, 3600, mouse_deg=self.mouse_deg)  # ten turns a frame: nothing turns faster


def is_file(script: str) -> bool:
    """Whether `script` is the name of a file, not words."""
    return Path(script).suffix.lower() in (".csv", ".json")


def read_script(script: str, action_space: ActionSpace, scripted: Scripted) -> Actions:
    """The actions, one row per frame, that `script` stands for.

    `random`; words such as `forward`, `turn_left`, `idle`, joined with `+` and held for frames after `:`, one after
    the other (`forward+turn_left:36,idle:12`, from the beginning again until the frames are filled); a CSV file in the
    format of a recording's actions.csv; a JSON file with a list of such words.
    """
    path, frames = storage.path(script), scripted.frames
    if path.suffix.lower() == ".csv":
        actions = read_actions(path, action_space)
        if len(actions) < frames:
            raise UserError(f"{path} has {len(actions)} rows for {frames} frames; ask for fewer")
        return actions[:frames]
    words = script_words(action_space, scripted.mouse_deg)
    if script == "random":
        table = [hold(entry, words, action_space) for entry in random_table(action_space)]
        return random_play(table, frames, scripted.seed)
    entries, index = [], list[int]()
    segments = parse_json(path.read_bytes(), path) if path.suffix.lower() == ".json" else script.split(",")
    if not (isinstance(segments, list) and segments and all(isinstance(segment, str) for segment in segments)):
        raise UserError(f'{path} must hold a list of segments, as in ["forward:36", "forward+turn_left:24"]')
    for i, segment in enumerate(segments):
        entry, colon, count = segment.strip().partition(":")
        digits = count.strip().lstrip("0")
        if colon and not (digits.isascii() and digits.isdecimal()):
            raise UserError(f"action script {segment!r}: after the colon comes a number of frames, as in idle:36")
        entries.append(hold(entry, words, action_space))
        index += [i] * min(int(digits[:18]) if colon else SEGMENT_FRAMES, frames - len(index))  # more is never seen
    return _rows(entries, np.resize(index, frames))


def script_words(action_space: ActionSpace, mouse_deg: float = MOUSE_DEG) -> dict[str, Actions]:
    """One row of actions for every word of a script: idle, the turns of the mouse, the keys."""
    still, rest = np.zeros((1, len(action_space.keys))), np.zeros((1, 2 * action_space.mouse))
    words = {"idle": Actions(still, rest)}
    if action_space.mouse:
        for name, turn in TURNS.items():
            if turn[0] and not action_space.pitch:
                continue
            words[name] = Actions(still, np.array([turn]) * (mouse_deg / action_space.mouse_unit_deg))
    pressed = np.eye(len(action_space.keys))
    return words | {key: Actions(row[None], rest) for key, row in zip(action_space.keys, pressed, strict=True)}


def hold(entry: str, words: Mapping[str, Actions], action_space: ActionSpace) -> Actions:
    """One row of actions: the words of `entry`, joined with `+`, held at once."""
    names = [word.strip() for word in entry.split("+")]
    for name in names:
        if name not in words:
            near = difflib.get_close_matches(name, [*words, "random"], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: random, {', '.join(words)}, or a .csv file"
            raise UserError(f"no key or preset {name!r} in the action space {action_space.name!r}; {hint}")
    keyboard = np.max([words[name].keyboard for name in names], axis=0)
    return Actions(keyboard, np.sum([words[name].mouse for name in names], axis=0))


def random_table(action_space: ActionSpace) -> list[str]:
    """What `random` draws from: upstream's table for a released game, else moves and turns as often as in play."""
    words, entries = script_words(action_space).keys(), UPSTREAM_TABLES.get(action_space.name, [])
    if entries and all(set(entry.split("+")) <= words for entry in entries):
        return entries
    moves = {move: share for move, share in MOVES.items() if set(move.split("+")) <= words}
    if "forward" not in action_space.keys:
        moves = {}
    moves |= {key: 1 for key in action_space.keys if key not in moves}
    pairs = product(moves.items(), (RANDOM_TURNS if action_space.mouse else {"idle": 1}).items())
    return [f"{move}+{turn}" for (move, often), (turn, share) in pairs for _ in range(often * share)]


def random_play(table: Sequence[Actions], frames: int, seed: int, segment: int = SEGMENT_FRAMES) -> Actions:
    """`frames` rows of play: a row of `table` in frame 0, then one per `segment` frames, drawn uniformly.

    The draws are those of Matrix-Game 2.0's sampler: the same seed of Python's `random` gives the same play.
    """
    rng, index = random.Random(seed), list[int]()
    while len(index) < frames:
        rng.randint(0, 0)  # upstream picks one of one group first, and that consumes random numbers
        index += [rng.randint(0, len(table) - 1)] * (segment if index else 1)
    return _rows(table, np.array(index[:frames]))


def _rows(table: Sequence[Actions], index: np.ndarray) -> Actions:
    keyboard, mouse = (np.concatenate([getattr(row, name) for row in table]) for name in ("keyboard", "mouse"))
    return Actions(keyboard[index].astype(np.float32), mouse[index].astype(np.float32))
