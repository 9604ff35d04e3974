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
import operator
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from configs.untrusted import reading
from data_pipeline.readers.keys import INPUTS, MOUSE_BUTTONS, bind_keys, mouse_rows
from data_pipeline.readers.logs import Row, read_frame_rows, read_number
from data_pipeline.readers.recording import Format, cut_episodes, find_pairs, open_video, read_pair
from data_pipeline.types import Actions, Episode

DEG_PER_PX = 360 / 2400
JUMP_DEG = 180.0  # of a tick; more is a window that got the mouse back, not a turn
TICK_MS = 20.0, 100.0  # a tick lasts 50
PART = re.compile(r"(.+-(?=[^-]*\d)[0-9a-z]+)-\d{8}-\d{6}")  # of a session, whose name is the group


class Tick(NamedTuple):
    """One line."""

    number: int  # of the game's tick, counted where it is not given
    milli: float  # when, in ms; NaN where it is not given
    view: bool = False  # what is held and how the mouse moves is known, and meant for the view
    inputs: Sequence[str] = ()  # held
    mouse_deg: tuple[float, float] = (0.0, 0.0)  # pitch up, yaw right


def read_recording(name: str, video: Path, log: Path, game: GameConfig) -> list[Episode]:
    """The episodes between open GUIs and other places where a recording is cut."""
    keys, footage = bind_keys(game, INPUTS), open_video(video, game)
    rows = read_frame_rows(log, footage, spare=1)
    ticks = read_ticks(rows)
    keyboard = np.stack([keys.row(tick.inputs, row.where) for tick, row in zip(ticks, rows, strict=True)])
    degrees = np.array([tick.mouse_deg for tick in ticks])
    keep = np.array([tick.view for tick in ticks]) & (np.abs(degrees) <= JUMP_DEG).all(axis=1)
    mouse = mouse_rows(game.action_space, np.where(keep[:, None], degrees, 0.0))
    took_ms = np.diff([tick.milli for tick in ticks], prepend=math.nan)
    left_out = np.diff([tick.number for tick in ticks], prepend=0) != 1
    jumps = left_out | (took_ms < TICK_MS[0]) | (took_ms > TICK_MS[1])
    return cut_episodes(name, footage, Actions(keyboard, mouse), keep, jumps)


FORMAT = Format(partial(find_pairs, log=".jsonl"), partial(read_pair, read_recording), session=PART)


def read_ticks(rows: Sequence[Row]) -> list[Tick]:
    """What the lines of a log say."""
    ticks: list[Tick] = []
    attack_stuck = False
    for row in rows:
        mouse, keyboard, gui = row.cell("mouse"), row.cell("keyboard"), row.down("isGuiOpen")
        number = row.count("tick") if "tick" in row.cells else len(ticks) and ticks[-1].number + 1
        if ticks and number <= ticks[-1].number:
            raise UserError(f"{row.where}: tick {number} after {ticks[-1].number}; the lines are out of order")
        tick = Tick(number, math.nan if row.cells.get("milli") is None else row.number("milli"))
        if mouse is not None and keyboard is not None:
            with reading(row.where):
                pressed = [*mouse["newButtons"]]
                attack_stuck = pressed == [0] if not ticks else attack_stuck and 0 not in pressed
                held = [_button(operator.index(i)) for i in mouse["buttons"] if not (attack_stuck and i == 0)]
                held += [key.removeprefix("key.keyboard.").replace(".", "_") for key in keyboard["keys"]]
                dx, dy = (read_number(mouse[name], f"{row.where}: mouse.{name}") for name in ("dx", "dy"))
            if not gui:
                tick = tick._replace(view=True, inputs=held, mouse_deg=(-dy * DEG_PER_PX, dx * DEG_PER_PX))
        ticks.append(tick)
    return ticks


def _button(number: int) -> str:
    return MOUSE_BUTTONS[number] if number in range(len(MOUSE_BUTTONS)) else f"mouse_{number + 1}"
