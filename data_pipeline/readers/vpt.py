"""OpenAI's VPT contractor recordings of Minecraft: pairs `<name>.mp4` and `<name>.jsonl` in one folder, 20 Hz.

Line i of the jsonl is what the player did at the tick whose picture is frame i, so it is action i and leads to frame
i + 1: VPT's own loader reads one frame and one line at a time and pairs them as observation and action
(openai/Video-Pre-Training, data_loader.py). One frame more than lines is usual: it has no action, and is left out.
Of a line these are used:

`mouse.dx`, `mouse.dy`: degrees = pixels x 360 / 2400 (its CAMERA_SCALER), x to the right and y downwards; here pitch,
that comes first, is positive upwards. They stay fractions: VPT's own loader cut them to whole degrees (its issue 54).
`mouse.buttons` 0 to 7: `mouse_left`, `mouse_right`, `mouse_middle`, `mouse_4` and so on. In early recordings the left
one is stuck from the first line on until it is pressed again (same loader); until then it does not count.
`keyboard.keys`: `key.keyboard.left.shift` is `left_shift`, and so on.
`isGuiOpen`: then the mouse moves a pointer, not the view; these frames are left out, so that an episode ends there and
another begins behind. The same where `mouse` or `keyboard` is null, where the mouse jumps by more than half a turn in a
tick, where `tick` leaves some out, and where the clock `milli` says that a tick took less than 20 or more than 100 ms.

A session is recorded in parts, `<alias>-<session>-<date>-<time>`, which are held out together.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers.keys import INPUTS, MOUSE_BUTTONS, bind_keys, mouse_rows
from data_pipeline.readers.logs import Row, read_frame_rows, read_number
from data_pipeline.readers.recording import Format, Recording, cut_episodes, find_pairs, find_spans, open_video
from data_pipeline.types import Actions, Episode

DEG_PER_PX = 360 / 2400
JUMP_DEG = 180.0  # of a tick; more is a window that got the mouse back, not a turn
TICK_MS = 20.0, 100.0  # a tick lasts 50
PART = re.compile(r"(.+-(?=[^-]*\d)[0-9a-z]+)-\d{8}-\d{6}")  # of a session, whose name is the group


class Tick(NamedTuple):
    """One line."""

    where: str  # file and line
    number: int  # of the game's tick, counted where it is not given
    milli: float  # when, in ms; NaN where it is not given
    view: bool = False  # what is held and how the mouse moves is known, and meant for the view
    inputs: Sequence[str] = ()  # held
    mouse_deg: tuple[float, float] = (0.0, 0.0)  # pitch up, yaw right


def find_recordings(source: str | Path) -> list[Recording]:
    """The pairs directly in `source`, by name."""
    here = storage.path(source)
    pairs = find_pairs(here, here, (".jsonl",), read_recording)
    return [pair._replace(session=part[1]) if (part := PART.fullmatch(pair.name)) else pair for pair in pairs]


FORMAT = Format(find_recordings)


def read_recording(name: str, video: Path, log: Path, game: GameConfig) -> list[Episode]:
    """The episodes between open GUIs and other places where a recording is cut."""
    keys, footage = bind_keys(game, INPUTS), open_video(video, game)
    ticks = read_ticks(read_frame_rows(log, footage, spare=1))
    keyboard = [keys.row(tick.inputs, tick.where) for tick in ticks]
    degrees = np.array([tick.mouse_deg for tick in ticks])
    keep = np.array([tick.view for tick in ticks]) & (np.abs(degrees) <= JUMP_DEG).all(axis=1)
    mouse = mouse_rows(game.action_space, np.where(keep[:, None], degrees, 0.0))
    jumps = [i > 0 and not _follows(tick, ticks[i - 1]) for i, tick in enumerate(ticks)]
    return cut_episodes(name, footage, Actions(np.stack(keyboard), mouse), find_spans(keep, np.array(jumps)))


def _follows(tick: Tick, before: Tick) -> bool:
    """Whether a tick is the one after `before`, at its time."""
    gap = tick.milli - before.milli
    return tick.number == before.number + 1 and not (gap < TICK_MS[0] or gap > TICK_MS[1])


def read_ticks(rows: Sequence[Row]) -> list[Tick]:
    """What the lines of a log say."""
    ticks: list[Tick] = []
    attack_stuck = False
    for where, line in rows:
        mouse, keyboard, gui = (line.get(name, False) for name in ("mouse", "keyboard", "isGuiOpen"))
        if "isGuiOpen" not in line or not (isinstance(gui, bool) and _is_part(mouse) and _is_part(keyboard)):
            raise UserError(f"{where} lacks mouse, keyboard or isGuiOpen, or has another kind of value there")
        before = ticks[-1].number if ticks else -1
        number = int(read_number(line.get("tick", before + 1), f"{where}: tick"))
        if ticks and number <= before:
            raise UserError(f"{where}: tick {number} after {before}; the lines are out of order")
        milli = math.nan if line.get("milli") is None else read_number(line["milli"], f"{where}: milli")
        tick = Tick(where, number, milli)
        if mouse is not None and keyboard is not None:
            buttons, pressed = (_list(mouse, name, where) for name in ("buttons", "newButtons"))
            attack_stuck = pressed == [0] if not ticks else attack_stuck and 0 not in pressed
            held = [_button(button, where) for button in buttons if not (attack_stuck and button == 0)]
            held += [_key(key) for key in _list(keyboard, "keys", where)]
            dx, dy = (read_number(mouse.get(name), f"{where}: mouse.{name}") for name in ("dx", "dy"))
            if not gui:
                tick = tick._replace(view=True, inputs=held, mouse_deg=(-dy * DEG_PER_PX, dx * DEG_PER_PX))
        ticks.append(tick)
    return ticks


def _is_part(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _list(part: dict[str, Any], name: str, where: str) -> list[Any]:
    found = part.get(name)
    if not isinstance(found, list):
        raise UserError(f"{where}: {name} must be a list, not {found!r:.80}")
    return found


def _button(number: Any, where: str) -> str:
    """0 -> `mouse_left`."""
    if type(number) is not int:  # a bool is none
        raise UserError(f"{where}: buttons must be whole numbers, not {number!r:.80}")
    return MOUSE_BUTTONS[number] if number in range(len(MOUSE_BUTTONS)) else f"mouse_{number + 1}"


def _key(key: Any) -> str:
    """`key.keyboard.left.shift` -> `left_shift`."""
    return str(key).removeprefix("key.keyboard.").replace(".", "_")
