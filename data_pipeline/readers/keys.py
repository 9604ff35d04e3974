"""From what recordings call keys and mouse buttons, and how they count the mouse, to the game's action vectors."""

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from configs.errors import UserError
from configs.game import ActionSpace, GameConfig

MOST_DEG = 3600.0  # a turn in one frame; more is damage, or another unit
MOUSE_BUTTONS = ("mouse_left", "mouse_right", "mouse_middle", *(f"mouse_{i}" for i in range(4, 9)))  # GLFW's
# One name for a key whatever format it comes from: those of Minecraft and GLFW, with _ for the dot.
NAMED_KEYS = (
    *("space", "enter", "tab", "escape", "backspace", "insert", "delete", "home", "end", "page_up", "page_down"),
    *("up", "down", "left", "right", "caps_lock", "num_lock", "scroll_lock", "print_screen", "pause", "menu"),
    *(f"{side}_{key}" for side in ("left", "right") for key in ("shift", "control", "alt", "win")),
    *("apostrophe", "comma", "minus", "period", "slash", "semicolon", "equal", "grave_accent", "backslash"),
    *("left_bracket", "right_bracket", "world_1", "world_2"),
    *(f"keypad_{key}" for key in ("add", "decimal", "divide", "enter", "equal", "multiply", "subtract", *range(10))),
    *(f"f{i}" for i in range(1, 26)),
)
INPUTS = frozenset((*"abcdefghijklmnopqrstuvwxyz0123456789", *NAMED_KEYS, *MOUSE_BUTTONS))


@dataclass(frozen=True)
class KeyMap:
    """Which elements of the keyboard vector each input of a recording sets."""

    game: GameConfig
    elements: dict[str, list[int]]  # of each input that is bound
    known: Collection[str] | None  # inputs that can be bound; None: any

    def spell(self, name: str, where: str) -> str:
        """The input `name` as it is bound, if need be in other case; as it is if it is not bound.

        A UserError if it could be either of two, even where `others` are dropped.
        """
        near = [name] if name in self.elements else _ignoring_case(name, self.elements)
        if len({tuple(self.elements[other]) for other in near}) > 1:
            raise UserError(f"{where}: {name[:80]!r} may be {' or '.join(near)}, which differ; bind it as well")
        return near[0] if near else name

    def row(self, held: Iterable[str], where: str) -> np.ndarray:
        """The keyboard vector (k) of 0 and 1 while the inputs `held` are; `where` names file and row in errors."""
        vector = np.zeros(len(self.game.action_space.keys), dtype=np.float32)
        for name in (self.spell(name, where) for name in held):
            if name in self.elements:
                vector[self.elements[name]] = 1
            elif self.game.inputs.others == "refuse":
                fix = "bind it in game.inputs.keys or " if self.known is None or name in self.known else ""
                raise UserError(f"{where}: {name[:80]!r} holds no key; {fix}set game.inputs.others=drop")
        return vector

    def rows(self, names: Sequence[str], table: np.ndarray, where: Callable[[int], str]) -> np.ndarray:
        """The keyboard vectors (n k) of a `table` (n c) of 0 and 1 with a column per input of `names`."""
        wrong = np.argwhere((table != 0) & (table != 1) & np.isin(names, [*self.elements]))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise UserError(f"{where(row)}: {names[column]} is {table[row, column]:g}; a key must be 0 or 1")
        keyboard = np.zeros((len(table), len(self.game.action_space.keys)), dtype=np.float32)
        for i, row in enumerate(table):
            keyboard[i] = self.row(compress(names, row), where(i))
        return keyboard


def bind_keys(game: GameConfig, known: Collection[str] | None = None) -> KeyMap:
    """The game's bindings; without any, a key is held by the input of its own name.

    A UserError for an input that is not in `known`, which is what recordings of a format can hold.
    """
    elements: dict[str, list[int]] = {}
    for key, names in (game.inputs.keys or {key: (key,) for key in game.action_space.keys}).items():
        for name in names:
            if known is not None and name not in known:
                same = _ignoring_case(name, known)
                if len(same) != 1:
                    near = ", ".join(difflib.get_close_matches(name, sorted(known), 5, 0))
                    raise UserError(f"game.inputs.keys.{key}: no input {name!r}, but {near}; [] binds nothing")
                name = same[0]
            elements.setdefault(name, []).append(game.action_space.keys.index(key))
    return KeyMap(game, elements, known)


def _ignoring_case(name: str, names: Iterable[str]) -> list[str]:
    return [other for other in names if other.casefold() == name.casefold()]


def scale_mouse(game: GameConfig, moves: np.ndarray, where: Callable[[int], str]) -> np.ndarray:
    """The mouse vectors (n 2) of `moves` (n 2), y and x in the units of `game.inputs.pitch_deg` and `yaw_deg`."""
    scale = game.inputs.pitch_deg, game.inputs.yaw_deg
    if game.action_space.mouse and not all(scale):
        how = "the degrees up and right of one recorded unit (of a pixel: pitch_deg < 0, since y counts downwards)"
        raise UserError(f"{where(0)}: set game.inputs.pitch_deg and game.inputs.yaw_deg, {how}")
    return mouse_rows(game.action_space, moves * scale, where)


def mouse_rows(space: ActionSpace, degrees: np.ndarray, where: Callable[[int], str] = "frame {}".format) -> np.ndarray:
    """The mouse vectors (n 2) of (pitch up, yaw right) in `degrees` (n 2); (n 0) for a game without a mouse.

    A UserError for more than `MOST_DEG` and for what is no number; `where` names a row.
    """
    if not space.mouse:
        return np.zeros((len(degrees), 0), dtype=np.float32)
    wrong = np.argwhere(~(np.abs(degrees) <= MOST_DEG))
    if len(wrong):
        row, axis = wrong[0].tolist()
        turn = f"{('pitch', 'yaw')[axis]} turns by {degrees[row, axis]:g} degrees in a frame"
        raise UserError(f"{where(row)}: {turn}; at most {MOST_DEG:g} is possible")
    return (degrees / space.mouse_unit_deg).astype(np.float32)
