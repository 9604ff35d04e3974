"""Facts about a game: which keys exist, its frame rate and its size."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from configs import to_dict, within
from configs.errors import UserError

MOST_PX = 8192  # of a frame's side
Column = Literal["time", "kind", "key", "button", "state", "dx", "dy", "keys", "frame"]
# begin, end: of the log, nothing is logged outside. pause, resume: nothing is logged between. start, stop: the video's
# first and last picture. change: another column says whether it is a press or a release.
EventKind = Literal["press", "release", "change", "move", "begin", "end", "pause", "resume", "start", "stop", "ignore"]


@dataclass(frozen=True)
class ActionSpace:
    """Which keys exist, in the order of the keyboard vector, and what one unit of mouse movement is."""

    name: str
    keys: tuple[str, ...]  # names, in the order of the keyboard vector
    caps: tuple[str, ...] = ()  # what the overlay writes on each key; the names if empty
    mouse: bool = True  # (pitch, yaw); pitch > 0 looks up, yaw > 0 turns right
    pitch: bool = True  # false: the mouse turns, and does not look up and down
    mouse_unit_deg: float = within(1e-6, 1e6, 1.0)  # degrees per frame that count as 1 in the mouse vector

    def __post_init__(self) -> None:
        if not self.keys or len(set(self.keys)) != len(self.keys):
            raise UserError(f"action space {self.name!r}: keys must be given and distinct, not {self.keys}")
        if self.caps and len(self.caps) != len(self.keys):
            raise UserError(f"action space {self.name!r}: {len(self.caps)} caps for {len(self.keys)} keys")

    def describe(self) -> str:
        """Name, keys and mouse unit, for messages."""
        mouse = f"mouse unit {self.mouse_unit_deg:g} deg" if self.mouse else "no mouse"
        mouse += ", no pitch" if self.mouse and not self.pitch else ""
        return f"{self.name!r} ({', '.join(self.keys)}; {mouse})"

    @property
    def hash(self) -> str:
        """Twelve hex digits over everything that changes what a vector means (not the caps)."""
        meaning = {key: value for key, value in to_dict(self).items() if key != "caps"}
        if self.pitch:  # as in shards of before the setting
            del meaning["pitch"]
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class InputConfig:
    """How recordings differ from the game: their frame rate, and their names for its actions."""

    fps: float | None = None  # of the recordings, if it is more than the game's: they are resampled
    times: Literal["even", "resample"] = "even"  # of a video's frames: uneven ones are refused, or taken by their times
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)  # key: inputs, any of which holds it
    others: Literal["refuse", "drop"] = "refuse"  # inputs that hold no key
    pitch_deg: float = 0.0  # degrees up per recorded unit of the mouse's y; a pixel, counted downwards: below 0
    yaw_deg: float = 0.0  # degrees right per recorded unit of the mouse's x
    axes: tuple[str, ...] = ()  # LeRobot: the components of `action` that are the mouse's y and x
    camera: str | None = None  # LeRobot: which video, where there are several
    offset_s: float = 0.0  # s that a log of events is moved against the video; > 0: things happened later in it
    columns: dict[Column, str] = field(default_factory=dict)  # event_log, table: their names for these
    kinds: dict[EventKind, tuple[str, ...]] = field(default_factory=dict)  # event_log: its words
    time_unit: Literal["s", "ms", "us", "ns"] = "s"  # event_log: of the log's times
    first_entry: Literal[0, 1, 2] = 1  # GF-Minecraft: the entry that leads on from frame 0

    def __post_init__(self) -> None:
        if self.axes and len(self.axes) != 2:
            raise UserError(f"game.inputs.axes must name two components, the mouse's y and x, not {list(self.axes)}")


@dataclass(frozen=True)
class GameConfig:
    """A game, and every clip cut from it."""

    name: str
    action_space: ActionSpace
    fps: float  # frames per second of recordings and of everything generated
    height: int  # px, a multiple of 16
    width: int  # px, a multiple of 16
    inputs: InputConfig = field(default_factory=InputConfig)  # travels with the shards, so that they can be judged

    def __post_init__(self) -> None:
        if not 0.1 <= self.fps <= 1000:
            raise UserError(f"{self.name}: fps={self.fps:g} must be from 0.1 to 1000")
        if not all(16 <= px <= MOST_PX and px % 16 == 0 for px in (self.height, self.width)):  # codec 8 x patch 2
            raise UserError(f"{self.name}: height and width must be multiples of 16 up to {MOST_PX} px")
        if self.inputs.fps is not None and self.inputs.fps < self.fps:
            raise UserError(f"{self.name}: inputs.fps={self.inputs.fps:g} must be at least fps={self.fps:g}")
        if self.inputs.keys and set(self.inputs.keys) != set(self.action_space.keys):
            differing = ", ".join(sorted(set(self.inputs.keys) ^ set(self.action_space.keys)))
            raise UserError(f"{self.name}: inputs.keys must name all keys of the action space; see {differing}")
