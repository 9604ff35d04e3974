"""The words of action scripts, and random play out of a table of them."""

import difflib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from configs.errors import UserError
from configs.game import ActionSpace
from data_pipeline.types import Actions

SEGMENT_FRAMES = 12  # how long one preset is held (Matrix-Game 2.0's sampler)
MOUSE_DEG = 3.0  # degrees per frame of turn_left, look_up, ...
TURNS = {"turn_left": (0, -1), "turn_right": (0, 1), "look_up": (1, 0), "look_down": (-1, 0)}  # (pitch, yaw)
SIDES, DIAGONALS, YAWS = ["left", "right"], ["forward+left", "forward+right"], ["turn_left", "turn_right"]


def _with_turns(moves: Iterable[str]) -> list[str]:
    return [f"{move}+{turn}" for move, turn in product(moves, YAWS)]


# What upstream draws from in its games, in its order: never back in universal, never up or down.
UPSTREAM_TABLES = {
    "universal": DIAGONALS * 5 + YAWS * 5 + ["forward", *SIDES] * 5 + _with_turns(["forward", *SIDES, *DIAGONALS]),
    "gta_drive": YAWS * 2 + ["forward", "back"] * 2 + _with_turns(["forward", "back"]),
    "templerun": ["jump", "slide", "leftside", "rightside", "turnleft", "turnright", "nomove"],
}

# The table of every other game, as how often each entry is there: moves of those keys that it has, each with each turn.
# Back is rare, as in play; standing still is not absent, so that a turn is also seen alone. No looking up or down:
# without the way back it ends in the sky.
MOVES = {"idle": 2, "forward": 5, "forward+left": 2, "forward+right": 2, "left": 2, "right": 2, "back": 1}
RANDOM_TURNS = {"idle": 4, "turn_left": 3, "turn_right": 3}


@dataclass(frozen=True)
class Preset:
    """Keys and mouse movement that are held together; a table may name one several times to make it likelier."""

    name: str
    keyboard: tuple[float, ...]
    mouse: tuple[float, ...] = ()  # (pitch, yaw); empty in an action space without a mouse


def presets(action_space: ActionSpace, mouse_deg: float = MOUSE_DEG) -> dict[str, Preset]:
    """Every word of a script: idle, the turns of the mouse, the keys."""
    rest = (0.0,) * (2 if action_space.mouse else 0)
    still = (0.0,) * len(action_space.keys)
    found = {"idle": Preset("idle", still, rest)}
    if action_space.mouse:
        units = mouse_deg / action_space.mouse_unit_deg
        found |= {name: Preset(name, still, (pitch * units, yaw * units)) for name, (pitch, yaw) in TURNS.items()}
    rows = np.eye(len(action_space.keys)).tolist()
    return found | {key: Preset(key, tuple(row), rest) for key, row in zip(action_space.keys, rows, strict=True)}


def hold(entry: str, words: Mapping[str, Preset], action_space: ActionSpace) -> Preset:
    """The words of `entry`, joined with `+`, held at once."""
    names = [word.strip() for word in entry.split("+")]
    for name in names:
        if name not in words:
            near = difflib.get_close_matches(name, [*words, "random"], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: random, {', '.join(words)}, or a .csv file"
            raise UserError(f"no key or preset {name!r} in the action space {action_space.name!r}; {hint}")
    keyboard = np.max([words[name].keyboard for name in names], axis=0)
    mouse = np.sum([words[name].mouse for name in names], axis=0)
    return Preset(entry, tuple(keyboard.tolist()), tuple(mouse.tolist()))


def random_table(action_space: ActionSpace, mouse_deg: float = MOUSE_DEG) -> list[Preset]:
    """What `random` draws from: upstream's table for a released game, else moves and turns as often as in play."""
    words = presets(action_space, mouse_deg)
    entries = UPSTREAM_TABLES.get(action_space.name, [])
    if not entries or not all(set(entry.split("+")) <= words.keys() for entry in entries):
        moves = {move: share for move, share in MOVES.items() if set(move.split("+")) <= words.keys()}
        if "forward" not in action_space.keys:
            moves = {}
        moves |= {key: 1 for key in action_space.keys if key not in moves}
        turns = RANDOM_TURNS if action_space.mouse else {"idle": 1}
        pairs = product(moves.items(), turns.items())
        entries = [f"{move}+{turn}" for (move, often), (turn, share) in pairs for _ in range(often * share)]
    return [hold(entry, words, action_space) for entry in entries]


def preset_actions(
    entries: Sequence[Preset], frames: int, seed: int | random.Random, segment: int = SEGMENT_FRAMES
) -> Actions:
    """`frames` rows of play: one entry in frame 0, then one per `segment` frames, drawn uniformly from `entries`.

    The draws are those of Matrix-Game 2.0's sampler: the same seed of Python's `random` gives the same play.
    """
    rng = random.Random(seed) if isinstance(seed, int) else seed
    drawn: list[Preset] = []
    while len(drawn) < frames:
        rng.randint(0, 0)  # upstream picks one of one group first, and that consumes random numbers
        entry = entries[rng.randint(0, len(entries) - 1)]
        drawn += [entry] * (segment if drawn else 1)
    keyboard = np.array([entry.keyboard for entry in drawn[:frames]], np.float32)
    return Actions(keyboard, np.array([entry.mouse for entry in drawn[:frames]], np.float32))
