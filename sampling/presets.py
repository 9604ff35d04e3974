"""Random play out of a table of presets, live replacement of actions, and which caps an overlay lights for them."""

import difflib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from configs.errors import UserError
from configs.game import ActionSpace
from data_pipeline.overlay import active_keys
from data_pipeline.types import Actions

SEGMENT_FRAMES = 12  # how long one preset is held (Matrix-Game 2.0's sampler)
MOUSE_DEG = 3.0  # degrees per frame of turn_left, look_up, ...
TURNS = {"turn_left": (0, -1), "turn_right": (0, 1), "look_up": (1, 0), "look_down": (-1, 0)}  # (pitch, yaw)

# The released games, as in configs/games. Upstream does not say how far a mouse value of 1 turns; with 30 degrees its
# camera step of 0.1 is a turn of MOUSE_DEG.
UPSTREAM_SPACES = {
    "universal": ActionSpace("universal", ("forward", "back", "left", "right"), ("W", "S", "A", "D"), True, 30.0),
    "gta_drive": ActionSpace("gta_drive", ("forward", "back"), ("W", "S"), True, 30.0),
    "templerun": ActionSpace(
        "templerun",
        ("nomove", "jump", "slide", "turnleft", "turnright", "leftside", "rightside"),
        ("", "W", "S", "left", "right", "A", "D"),
        mouse=False,
    ),
}
SIDES, DIAGONALS, YAWS = ["left", "right"], ["forward+left", "forward+right"], ["turn_left", "turn_right"]


def _with_turns(moves: Iterable[str]) -> list[str]:
    return [f"{move}+{turn}" for move, turn in product(moves, YAWS)]


# What upstream draws from, in its order: never back in universal, never up or down.
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
    rows = np.eye(len(action_space.keys)).tolist()
    found = {"idle": Preset("idle", (0.0,) * len(rows), rest)}
    if action_space.mouse:
        units = mouse_deg / action_space.mouse_unit_deg
        still = found["idle"].keyboard
        found |= {name: Preset(name, still, (pitch * units, yaw * units)) for name, (pitch, yaw) in TURNS.items()}
    return found | {key: Preset(key, tuple(row), rest) for key, row in zip(action_space.keys, rows, strict=True)}


def hold(entry: str, words: Mapping[str, Preset], action_space: ActionSpace) -> Preset:
    """The words of `entry`, joined with `+`, held at once. Raises ValueError that names the nearest word."""
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
    released = UPSTREAM_SPACES.get(action_space.name)
    if released and released.hash == action_space.hash:
        entries = UPSTREAM_TABLES[action_space.name]
    else:
        moves = {move: share for move, share in MOVES.items() if set(move.split("+")) <= words.keys()}
        if "forward" not in action_space.keys:
            moves = {}
        moves |= {key: 1 for key in action_space.keys if key not in moves}
        turns = RANDOM_TURNS if action_space.mouse else {"idle": 1}
        pairs = product(moves.items(), turns.items())
        entries = [f"{move}+{turn}" for (move, often), (turn, share) in pairs for _ in range(often * share)]
    return [hold(entry, words, action_space) for entry in entries]


UPSTREAM_PRESETS = {name: partial(random_table, space) for name, space in UPSTREAM_SPACES.items()}


def preset_actions(
    entries: Sequence[Preset], frames: int, seed: int | random.Random, segment: int = SEGMENT_FRAMES
) -> Actions:
    """`frames` rows of play: one entry in frame 0, then one per `segment` frames, drawn uniformly from `entries`.

    The draws are those of Matrix-Game 2.0's sampler: the same seed of Python's `random` gives the same play.
    """
    if not entries or frames < 1 or segment < 1:
        raise UserError(f"random play needs presets ({len(entries)}), frames ({frames}) and a segment ({segment})")
    rng = random.Random(seed) if isinstance(seed, int) else seed
    drawn: list[Preset] = []
    while len(drawn) < frames:
        rng.randint(0, 0)  # upstream picks one of one group first, and that consumes random numbers
        entry = entries[rng.randint(0, len(entries) - 1)]
        drawn += [entry] * (segment if drawn else 1)
    keyboard = np.array([entry.keyboard for entry in drawn[:frames]], np.float32)
    return Actions(keyboard, np.array([entry.mouse for entry in drawn[:frames]], np.float32))


def live_rows(start: int, block: int, frames_per_latent: int = 4) -> slice:
    """The pixel frames whose actions a live player decides before latents `start` ... `start + block - 1` are made."""
    end = 1 + frames_per_latent * (start + block - 1)
    first = 0 if start == 0 else end - frames_per_latent * block
    return slice(first, end)


def replace_rows(
    actions: Actions, rows: slice, keyboard: np.ndarray | None = None, mouse: np.ndarray | None = None
) -> Actions:
    """`actions` with the same keys (k) and mouse movement (2) held in all of `rows`; None leaves what was there."""
    new_keyboard, new_mouse = actions.keyboard.copy(), actions.mouse.copy()
    if keyboard is not None:
        new_keyboard[rows] = keyboard
    if mouse is not None:
        new_mouse[rows] = mouse
    return Actions(new_keyboard, new_mouse)


CURSOR_START_PX = (320.0, 176.0)  # (x, y): the middle of 640 x 352
CURSOR_PX_PER_UNIT = (1.5, -6.0)  # x per yaw, y per pitch


def cursor_path(mouse: np.ndarray) -> np.ndarray:
    """Where upstream's overlay draws the cursor: (x, y) px (n 2) of each frame, of rows of mouse (n 2) in (pitch, yaw).

    It stands in the middle at frame 0, whatever row 0 says; row i moves it between frames i - 1 and i.
    """
    moves = mouse[:, ::-1].astype(np.float32) * np.array(CURSOR_PX_PER_UNIT, np.float32)
    moves[:1] = CURSOR_START_PX
    return np.cumsum(moves, axis=0, dtype=np.float32)  # upstream's sum is fp32 too


def lit_keys(game: str, actions: Actions) -> np.ndarray:
    """Which caps upstream's overlay lights (n caps): W, A, S, D, and for templerun left and right, 0 or 1."""
    if game not in UPSTREAM_SPACES:
        raise UserError(f"no overlay of upstream's for {game!r}; there are: {', '.join(UPSTREAM_SPACES)}")
    lit = active_keys(UPSTREAM_SPACES[game], actions)
    order = [label for label in ("W", "A", "S", "D", "left", "right") if label in lit]
    return np.stack([lit[label] for label in order], axis=1).astype(np.float32)
