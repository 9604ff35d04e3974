"""What recordings call keys and mouse buttons, and which key of the action space each of them holds."""

import difflib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers.recording import LARGEST

MOST_DEG = 3600.0  # that anybody turns in a frame; more is damage, or another unit
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
    """Names of inputs to places in the keyboard vector."""

    game: GameConfig
    places: dict[str, list[int]]  # of each input that holds something
    known: Collection[str] | None  # inputs that can be bound; None: any

    def spell(self, name: str, where: str) -> str:
        """The input `name` as it is bound: by its own spelling, else by one in other case. As it is, if by none.

        Raises ValueError, whatever becomes of others, if it could be either of two.
        """
        near = [] if name in self.places else _same_but_case(name, self.places)
        if len({tuple(self.places[one]) for one in near}) > 1:
            raise UserError(
                f"{where}: {name[:80]!r} may be {' or '.join(near)}, which hold different keys; bind it as well"
            )
        return near[0] if near else name

    def row(self, held: Iterable[str], where: str) -> np.ndarray:
        """The keyboard vector (k) of 0 and 1 while the inputs `held` are; `where` names file and row in errors."""
        vector = np.zeros(len(self.game.action_space.keys), dtype=np.float32)
        for name in (self.spell(name, where) for name in held):
            if name in self.places:
                vector[self.places[name]] = 1
            elif self.game.inputs.others == "refuse":
                binding = "bind it in game.inputs.keys or " if self.known is None or name in self.known else ""
                raise UserError(
                    f"{where}: {name[:80]!r} holds no key of {self.game.name!r}; {binding}set game.inputs.others=drop"
                )
        return vector


def bind_keys(game: GameConfig, known: Collection[str] | None, where: str) -> KeyMap:
    """The game's bindings; without any, a key is held by the input of its own name.

    Raises ValueError for an input that is not in `known`, which is what the recordings `where` can hold.
    """
    bound = game.inputs.keys or {key: (key,) for key in game.action_space.keys}
    places: dict[str, list[int]] = {}
    for key, inputs in bound.items():
        for name in inputs:
            if known is not None and name not in known:
                same = _same_but_case(name, known)
                name = same[0] if len(same) == 1 else name
            if known is not None and name not in known:
                near = sorted(known) if len(known) < 20 else difflib.get_close_matches(name, known, 5, 0)
                raise UserError(
                    f"game.inputs.keys.{key}: {where} have no input {name!r}, but {', '.join(near)}; "
                    "[] is a key that nothing holds"
                )
            places.setdefault(name, []).append(game.action_space.keys.index(key))
    return KeyMap(game, places, known)


def _same_but_case(name: str, names: Iterable[str]) -> list[str]:
    return [one for one in names if one.casefold() == name.casefold()]


def require_mouse_scale(game: GameConfig, where: str) -> None:
    """Raises ValueError if the mouse counts, but not how many degrees one recorded unit is."""
    if game.action_space.mouse and not (game.inputs.pitch_deg and game.inputs.yaw_deg):
        raise UserError(
            f"{where} count the mouse in units of their own: set game.inputs.pitch_deg and game.inputs.yaw_deg, the "
            "degrees up and right of one unit (of a pixel: pitch_deg < 0, since y counts downwards)"
        )


def mouse_rows(game: GameConfig, degrees: np.ndarray, where: Callable[[int], str] = "frame {}".format) -> np.ndarray:
    """The mouse vectors (n 2) of (pitch up, yaw right) in `degrees` (n 2); (n 0) for a game without a mouse.

    Raises ValueError as `check_degrees`.
    """
    space = game.action_space
    mouse = check_degrees(degrees if space.mouse else degrees[:, :0], where) / space.mouse_unit_deg
    if not (np.abs(mouse) <= LARGEST).all():
        raise UserError(f"{where(0)}: turns of mouse_unit_deg={space.mouse_unit_deg:g} overflow; use a larger unit")
    return mouse.astype(np.float32)


def check_degrees(degrees: np.ndarray, where: Callable[[int], str]) -> np.ndarray:
    """`degrees` (n 2) of (pitch, yaw), if a frame can turn by each; `where` names file and place of a row's number.

    Raises ValueError for one that is no number or beyond `MOST_DEG`: the actions would be infinite, or nonsense.
    """
    wrong = np.argwhere(~(np.abs(degrees) <= MOST_DEG))
    if len(wrong):
        row, axis = (int(number) for number in wrong[0])
        raise UserError(
            f"{where(row)}: {('pitch', 'yaw')[axis]} turns by {degrees[row, axis]:g} degrees in a frame; at most "
            f"{MOST_DEG:g} is possible"
        )
    return degrees
