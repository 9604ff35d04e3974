"""OpenAI's VPT contractor recordings of Minecraft: pairs `<name>.mp4` and `<name>.jsonl` in one folder, 20 Hz.

Line i of the jsonl is what the player did at the tick whose picture is frame i, so it is action i and leads to frame
i + 1: VPT's own loader reads one frame and one line at a time and pairs them as observation and action
(openai/Video-Pre-Training, data_loader.py). One frame more than lines is usual: it has no action, and is left out.
Of a line these are used:

`mouse.dx`, `mouse.dy`: degrees = pixels x 360 / 2400 (its CAMERA_SCALER), x to the right and y downwards; here pitch,
that comes first, is positive upwards. They stay fractions: VPT's own loader cut them to whole degrees (its issue 54).
`mouse.buttons` 0 to 7: `mouse_left`, `mouse_right`, `mouse_middle`, `mouse_4` and so on. In early recordings the left
one is stuck from the first line on until it is pressed anew (same loader); until then it does not count.
`keyboard.keys`: `key.keyboard.left.shift` is `left_shift`, and so on.
`isGuiOpen`: then the mouse moves a pointer, not the view; these frames are left out, so that an episode ends there and
another begins behind. The same where `mouse` or `keyboard` is null, where the mouse jumps by more than half a turn in a
tick, where `tick` leaves some out, and where the clock `milli` says that a tick took less than 20 or more than 100 ms.

A session is recorded in parts, `<alias>-<session>-<date>-<time>`, which are held out together.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.foreign import parse_object
from configs.game import GameConfig
from data_pipeline.readers.keys import INPUTS, MOUSE_BUTTONS, bind_keys, mouse_rows
from data_pipeline.readers.recording import (
    Recording,
    VideoEpisode,
    check_rows,
    cut_video,
    find_pairs,
    find_spans,
    probe_video,
    read_number,
    read_text,
)
from data_pipeline.types import Actions

DEG_PER_PX = 360 / 2400
KEY_PREFIX = "key.keyboard."
JUMP_DEG = 180.0  # of a tick; more is a window that got the mouse back, not a turn
TICK_MS = 20.0, 100.0  # a tick lasts 50
PART = re.compile(r"(.+-(?=[^-]*\d)[0-9a-z]+)-\d{8}-\d{6}")  # of a session, whose name is the group


class Tick(NamedTuple):
    """One line."""

    where: str  # file and line
    inputs: list[str]  # held
    mouse_deg: tuple[float, float]  # pitch up, yaw right
    play: bool  # what is held and how the mouse moves is known, and meant for the view
    number: int  # of the game's tick, counted where it is not given
    milli: float  # when, in ms; NaN where it is not given


def find_recordings(source: str | Path) -> list[Recording]:
    """The pairs directly in `source`, by name."""
    recordings = find_pairs(storage.path(source), storage.path(source), (".jsonl",), read_pair)
    return [one._replace(session=part[1]) if (part := PART.fullmatch(one.name)) else one for one in recordings]


def read_pair(video: Path, log: Path, game: GameConfig) -> list[VideoEpisode]:
    """The episodes between open GUIs and other places where a recording is cut.

    Raises ValueError in one line: lines and frames that do not go together, another fps, a line that is damaged or out
    of order, a key that the game does not have (`inputs.others: drop` leaves those out).
    """
    keys = bind_keys(game, INPUTS, "VPT recordings")
    info, ticks = probe_video(video, game), list(read_ticks(log))
    if len(ticks) != info.frames - 1:
        check_rows(log, len(ticks), video, info)
    keyboard = [keys.row(tick.inputs if tick.play else (), tick.where) for tick in ticks]
    degrees = np.array([tick.mouse_deg if tick.play else (0.0, 0.0) for tick in ticks])
    keep = np.array([tick.play for tick in ticks]) & (np.abs(degrees) <= JUMP_DEG).all(axis=1)
    actions = Actions(np.stack(keyboard), mouse_rows(game, np.where(keep[:, None], degrees, 0.0)))
    jumps = [i > 0 and not _follows(tick, ticks[i - 1]) for i, tick in enumerate(ticks)]
    return cut_video(video.stem, video, info, game, actions, find_spans(keep, np.array(jumps)))


def _follows(tick: Tick, before: Tick) -> bool:
    """Whether a tick is the one after `before`, at its time."""
    gap = tick.milli - before.milli
    return tick.number == before.number + 1 and not (gap < TICK_MS[0] or gap > TICK_MS[1])


def read_ticks(log: Path) -> Iterator[Tick]:
    """The lines of a jsonl. Raises ValueError for a damaged one and for ticks out of order."""
    attack_stuck, number = False, -1
    for i, line in enumerate(read_text(log).rstrip("\n").split("\n")):  # splitlines would cut within what was typed
        where = f"{log} line {i + 1}"
        tick = parse_object(line, where)
        missing = [name for name in ("mouse", "keyboard", "isGuiOpen") if name not in tick]
        mouse, keyboard, gui = (tick.get(name) for name in ("mouse", "keyboard", "isGuiOpen"))
        parts = [part for part in (mouse, keyboard) if part is not None]
        if missing or not all(isinstance(part, dict) for part in parts) or not isinstance(gui, bool):
            raise UserError(f"{where} lacks {', '.join(missing) or 'a usual mouse, keyboard or isGuiOpen'}")
        after, number = number, int(read_number(tick.get("tick", number + 1), f"{where}: tick"))
        if number <= after and i:
            raise UserError(f"{where}: tick {number} after {after}; the lines are out of order")
        milli = math.nan if tick.get("milli") is None else read_number(tick["milli"], f"{where}: milli")
        if mouse is None or keyboard is None:
            yield Tick(where, [], (0.0, 0.0), False, number, milli)
            continue
        buttons, new_buttons = (read_list(mouse, name, where) for name in ("buttons", "newButtons"))
        if not all(type(button) is int for button in buttons):  # a bool is none
            raise UserError(f"{where}: buttons must be whole numbers, not {buttons!r}")
        attack_stuck = new_buttons == [0] if i == 0 else attack_stuck and 0 not in new_buttons
        held = [MOUSE_BUTTONS[i] if i in range(len(MOUSE_BUTTONS)) else f"mouse_{i + 1}" for i in buttons]
        held = [name for name in held if not (attack_stuck and name == MOUSE_BUTTONS[0])]
        held += [name_key(key) for key in read_list(keyboard, "keys", where)]
        dx, dy = (read_number(mouse.get(name), f"{where}: mouse.{name}") for name in ("dx", "dy"))
        yield Tick(where, held, (-dy * DEG_PER_PX, dx * DEG_PER_PX), not gui, number, milli)


def read_list(part: dict[str, Any], name: str, where: str) -> list[Any]:
    """A list of a line."""
    found = part.get(name)
    if not isinstance(found, list):
        raise UserError(f"{where}: {name} must be a list, not {found!r}")
    return found


def name_key(key: Any) -> str:
    """`key.keyboard.left.shift` -> `left_shift`."""
    return str(key).removeprefix(KEY_PREFIX).replace(".", "_")
