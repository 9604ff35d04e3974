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
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers.event_rows import Event, EventLog, Kind, cut_by_log, sort_events
from data_pipeline.readers.keys import bind_keys
from data_pipeline.readers.logs import EVENT_BYTES, Row, read_number, read_rows
from data_pipeline.readers.recording import Format, find_pairs_or_folders, read_pair, say
from data_pipeline.types import Episode

COLUMNS = ("time", "kind", "key", "button", "state", "dx", "dy")
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
Meaning = Kind | Literal["change", "ignore"]
WORDS: dict[Meaning, tuple[str, ...]] = {
    "press": ("press", "pressed", "down", "keydown", "key_down", "mousedown", "mouse_down", "1", "true"),
    "release": ("release", "released", "up", "keyup", "key_up", "mouseup", "mouse_up", "0", "false"),
    "change": ("key", "keyboard", "button", "mouse_button", "click"),
    "move": ("move", "mousemove", "mouse_move"),
    **{kind: (kind,) for kind in ("begin", "end", "pause", "resume", "start", "stop", "ignore")},
}
APART_S = 5.0  # by which log and video may end apart without a word
ODD, FEW = 100, 20  # a log that is so many times as long as the video, or as short, if it has that many events


class Vocabulary(NamedTuple):
    """What the log calls things."""

    columns: Mapping[str, str]  # by role
    words: Mapping[str, Meaning]
    unit_s: float
    mouse: bool  # whether moves count

    def meaning(self, cells: Mapping[str, str], role: str, where: str) -> Meaning:
        """What the word in the cell of a role stands for."""
        word, column = cells.get(role, ""), self.columns[role]
        if word.casefold() not in self.words:
            fix = f"say in game.inputs.kinds what it is: {', '.join(WORDS)}"
            raise UserError(f"{where}: {column} is {word[:80]!r}; {fix}")
        return self.words[word.casefold()]


def read_log(name: str, video: Path, log: Path, game: GameConfig) -> list[Episode]:
    """The episodes of a video and its log, cut where nothing was logged."""
    keys, vocabulary = bind_keys(game), read_vocabulary(game)
    events = sort_events(video, log, read_events(log, vocabulary, game), game)
    start = events.first("start")
    if start is None and "start" in game.inputs.kinds:
        raise UserError(f"{log} has no event of game.inputs.kinds.start ({', '.join(game.inputs.kinds['start'])})")
    zero_s = start.time if start else 0.0
    _compare_lengths(events, zero_s - game.inputs.offset_s)
    return cut_by_log(name, events, zero_s, keys)


FORMAT = Format(find_pairs_or_folders, partial(read_pair, read_log), scaled_mouse=True)


def read_vocabulary(game: GameConfig) -> Vocabulary:
    """What logs call things, by the game's settings."""
    inputs = game.inputs
    for setting, given, known in (("columns", inputs.columns, COLUMNS), ("kinds", inputs.kinds, WORDS)):
        if unknown := given.keys() - {*known}:
            raise UserError(f"game.inputs.{setting} has no {min(unknown)!r}; there are {', '.join(known)}")
    words: dict[str, str] = {}
    for kind, some in inputs.kinds.items():
        for word in some:
            if words.setdefault(word.casefold(), kind) != kind:
                raise UserError(f"game.inputs.kinds: {word!r} cannot be both {words[word.casefold()]} and {kind}")
    usual = {word: kind for kind, some in WORDS.items() if kind not in inputs.kinds for word in some}
    columns = {role: inputs.columns.get(role, role) for role in COLUMNS}
    meanings = cast(dict[str, Meaning], usual | words)
    return Vocabulary(columns, meanings, UNITS_S[inputs.time_unit], game.action_space.mouse)


def read_events(log: Path, vocabulary: Vocabulary, game: GameConfig) -> Iterator[Event]:
    """What the rows say happened, in their order."""
    named = game.inputs.columns.values() if log.suffix.lower() == ".csv" else ()
    for row in read_rows(log, EVENT_BYTES):
        for column in named:
            row.cell(column)  # a UserError if there is none
        yield from read_row(row, vocabulary)


def read_row(row: Row, vocabulary: Vocabulary) -> Iterator[Event]:
    """What one row says happened."""
    where, columns = row.where, vocabulary.columns
    cells = {role: text for role, column in columns.items() if (text := _text(row.cells.get(column)))}
    if row.cells.get(columns["key"]) == " ":
        cells["key"] = "space"
    time = row.number(columns["time"]) * vocabulary.unit_s
    kind = vocabulary.meaning(cells, "kind", where) if "kind" in cells else None
    if kind not in (None, "press", "release", "change", "move"):
        if kind != "ignore":
            yield Event(time, where, kind)
        return
    if "button" in cells and not cells["button"].casefold().startswith("mouse_"):
        cells["button"] = f"mouse_{cells['button']}"
    names = [cells[role] for role in ("key", "button") if role in cells and kind != "move"]
    moved = bool({"dx", "dy"} & cells.keys()) and kind in (None, "move")
    if not names and not moved:
        raise UserError(f"{where} names neither a key nor a move (game.inputs.columns, kinds)")
    if names:
        down = kind if kind in ("press", "release") else vocabulary.meaning(cells, "state", where)
        if down not in ("press", "release"):
            raise UserError(f"{where}: {columns['state']} is {cells['state'][:80]!r}, no press and no release")
        yield from (Event(time, where, down, name) for name in names)
    if moved and vocabulary.mouse:
        move = [read_number(cells.get(role, 0), f"{where}: {columns[role]}") for role in ("dx", "dy")]
        yield Event(time, where, "move", move)


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
