"""A video and a log of events each, by any recorder: pairs of `<name>.mp4` and `<name>.csv` or `.jsonl`, or folders.

A row is something that happened at a `time`: a press or a release of a `key` or a mouse `button`, or a move of the
mouse by `dx` to the right and `dy` downwards. `game.inputs.columns` says what the log calls these, `game.inputs.kinds`
which words in its column `kind` mean what (`WORDS` are understood in any case); kind `change` is for rows whose column
`state` says whether it is a press or a release, in the words of those. A log without kinds has keys with a state, or
moves, in each row. Empty cells, and those that a JSON object lacks, say nothing. Names of keys are bound as they are
written (`forward: [KeyW]`, `jump: ["32"]`), those in `button` as `mouse_<name>`.

Times count from the video's first frame, in `game.inputs.time_unit`, or from wherever they like if a row of kind
`start` says when that frame was; `offset_s` comes on top. How events become frames: event_rows.py.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.game import Column, EventKind, GameConfig, InputConfig
from data_pipeline.readers.event_rows import Event, EventLog, cut_by_log, sort_events
from data_pipeline.readers.keys import bind_keys
from data_pipeline.readers.logs import EVENT_BYTES, Row, read_number, read_rows
from data_pipeline.readers.recording import Format, find_pairs_or_folders, read_pair, say
from data_pipeline.types import Episode

COLUMNS: tuple[Column, ...] = ("time", "kind", "key", "button", "state", "dx", "dy")
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
WORDS: dict[EventKind, tuple[str, ...]] = {
    "press": ("press", "pressed", "down", "keydown", "key_down", "mousedown", "mouse_down", "1", "true"),
    "release": ("release", "released", "up", "keyup", "key_up", "mouseup", "mouse_up", "0", "false"),
    "change": ("key", "keyboard", "button", "mouse_button", "click"),
    "move": ("move", "mousemove", "mouse_move"),
    **{kind: (kind,) for kind in ("begin", "end", "pause", "resume", "start", "stop", "ignore")},
}
APART_S = 5.0  # by which log and video may end apart without a note
ODD, FEW = 100, 20  # a log that is so many times as long as the video, or as short, if it has that many events


def read_log(name: str, video: Path, log: Path, game: GameConfig) -> list[Episode]:
    """The episodes of a video and its log, cut where nothing was logged."""
    keys, events = bind_keys(game), sort_events(video, log, read_events(log, game.inputs), game)
    start = events.first("start")
    if start is None and "start" in game.inputs.kinds:
        raise UserError(f"{log} has no event of game.inputs.kinds.start ({', '.join(game.inputs.kinds['start'])})")
    zero_s = start.time if start else 0.0
    _compare_lengths(events, zero_s - game.inputs.offset_s)
    return cut_by_log(name, events, zero_s, keys)


FORMAT = Format(partial(find_pairs_or_folders, logs=(".csv", ".jsonl")), partial(read_pair, read_log))


def read_events(log: Path, inputs: InputConfig) -> Iterator[Event]:
    """What the rows say happened, in their order."""
    columns: dict[Column, str] = {role: inputs.columns.get(role, role) for role in COLUMNS}
    words: dict[str, EventKind] = {}
    for kind, names in inputs.kinds.items():
        for name in map(str.casefold, names):
            if words.setdefault(name, kind) != kind:
                raise UserError(f"game.inputs.kinds: {name!r} cannot be both {words[name]} and {kind}")
    for kind, names in WORDS.items():
        words |= {name: kind for name in names if kind not in inputs.kinds and name not in words}
    for row in read_rows(log, EVENT_BYTES):
        for column in inputs.columns.values() if log.suffix.lower() == ".csv" else ():
            row.cell(column)  # a UserError if there is none
        time = row.number(columns["time"]) * UNITS_S[inputs.time_unit]
        for kind, value in read_row(row, columns, words):
            yield Event(time, row.where, kind, value)


def read_row(row: Row, columns: Mapping[Column, str], words: Mapping[str, EventKind]) -> Iterator[tuple[Any, Any]]:
    """Kind and value of each event that a row holds."""

    def meaning(role: Column) -> EventKind:
        word = cells.get(role, "")
        if word.casefold() not in words:
            fix = f"say in game.inputs.kinds what it is: {', '.join(WORDS)}"
            raise UserError(f"{row.where}: {columns[role]} is {word[:80]!r}; {fix}")
        return words[word.casefold()]

    cells = {role: text for role, column in columns.items() if (text := _text(row.cells.get(column)))}
    if row.cells.get(columns["key"]) == " ":
        cells["key"] = "space"
    if "button" in cells and not cells["button"].casefold().startswith("mouse_"):
        cells["button"] = f"mouse_{cells['button']}"
    kind = meaning("kind") if "kind" in cells else None
    if kind not in (None, "press", "release", "change", "move"):
        yield from [(kind, None)] if kind != "ignore" else []
        return
    names = [cells[role] for role in ("key", "button") if role in cells and kind != "move"]
    moved = not {"dx", "dy"}.isdisjoint(cells) and kind in (None, "move")
    if not names and not moved:
        raise UserError(f"{row.where} names neither a key nor a move (game.inputs.columns, kinds)")
    for name in names:
        down = kind if kind in ("press", "release") else meaning("state")
        if down not in ("press", "release"):
            raise UserError(f"{row.where}: {columns['state']} is {cells['state'][:80]!r}, no press and no release")
        yield down, name
    if moved:
        yield "move", [read_number(cells.get(role, 0), f"{row.where}: {columns[role]}") for role in ("dx", "dy")]


def _text(value: Any) -> str:
    """A cell's text, empty for null; 1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return "" if value is None else str(value).strip()


def _compare_lengths(log: EventLog, zero_s: float) -> None:
    """A UserError for a log of other units or of another video; a note if the two end apart."""
    video, length = log.footage.path, float(log.times[-1])
    times = np.concatenate([[event.time for event in log.events], log.moves[:, 0]]) - zero_s
    if not ((times >= 0) & (times <= length)).any():
        seen = f"its times are {times.min():g} to {times.max():g} s" if len(times) else "it has no events"
        fix = "see game.inputs.time_unit, offset_s and kinds.start"
        raise UserError(f"{log.path}: nothing happened while {video} ({length:g} s) was shown, {seen}; {fix}")
    if len(times) >= FEW and not length / ODD < np.ptp(times) < length * ODD:
        raise UserError(f"{log.path} lasts {np.ptp(times):g} s, {video} {length:g} s; set game.inputs.time_unit")
    apart = float(times.max()) - length
    if abs(apart) > APART_S and not log.first("stop", "end"):
        say(f"{log.path} ends {abs(apart):.1f} s {'after' if apart > 0 else 'before'} {video} does")
