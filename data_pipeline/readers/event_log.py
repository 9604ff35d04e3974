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

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from configs.errors import UserError
from configs.foreign import parse_object
from configs.game import GameConfig
from data_pipeline.readers.event_rows import (
    Event,
    EventLog,
    Kind,
    Screen,
    cut_by_log,
    open_screen,
    opened_log,
    sort_events,
)
from data_pipeline.readers.keys import bind_keys, require_mouse_scale
from data_pipeline.readers.recording import (
    VIDEOS,
    Recording,
    VideoEpisode,
    list_files,
    list_folders,
    read_number,
    say,
    say_left_out,
)

LOGS = (".csv", ".jsonl")
COLUMNS = ("time", "kind", "key", "button", "state", "dx", "dy")
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
Meaning = Kind | Literal["change", "ignore"]
WORDS: dict[Meaning, tuple[str, ...]] = {
    "press": ("press", "pressed", "down", "keydown", "key_down", "mousedown", "mouse_down", "1", "true"),
    "release": ("release", "released", "up", "keyup", "key_up", "mouseup", "mouse_up", "0", "false"),
    "change": ("key", "keyboard", "button", "mouse_button", "click"),
    "move": ("move", "mousemove", "mouse_move"),
    "begin": ("begin",),
    "end": ("end",),
    "pause": ("pause",),
    "resume": ("resume",),
    "start": ("start",),
    "stop": ("stop",),
    "ignore": ("ignore",),
}
APART_S = 5.0  # by which log and video may end apart without a word
ODD, FEW = 100, 20  # a log that is so many times as long as the video, or as short, if it has that many events


class Format(NamedTuple):
    """What the log calls things."""

    columns: Mapping[str, str]  # by role
    words: Mapping[str, Meaning]
    unit_s: float
    mouse: bool  # whether moves count


def find_recordings(source: str | Path) -> list[Recording]:
    """The videos directly in `source` with the log of their names; or the folders in it with a video and a log."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    files = list_files(source, *VIDEOS, *LOGS) if list_files(source, *VIDEOS) else []  # a table may list the folders
    for path in files:
        by_name[path.stem if len(files) > 2 else files[0].stem].append(path)
    if not files:
        folders = {folder: list_files(folder, *VIDEOS, *LOGS) for folder in list_folders(source)}
        by_name = {folder.name: held for folder, held in folders.items() if held}
        say_left_out(source, [folder for folder, held in folders.items() if not held], "neither a video nor a log")
    if not by_name:
        raise UserError(f"{source} holds no videos with a log ({', '.join(LOGS)}) each")
    return [Recording(name, partial(read_pair, name, held)) for name, held in sorted(by_name.items())]


def read_pair(name: str, files: Sequence[Path], game: GameConfig) -> list[VideoEpisode]:
    """The episodes of a video and its log, cut where nothing was logged.

    Raises ValueError in one line with line and column of the log.
    """
    videos, logs = ([path for path in files if path.name.lower().endswith(kinds)] for kinds in (VIDEOS, LOGS))
    if len(videos) != 1 or len(logs) != 1:
        have = ", ".join(path.name for path in files)
        raise UserError(f"{files[0]}: a recording is one video and one log ({', '.join(LOGS)}), not {have}")
    require_mouse_scale(game, "logs of events")
    keys, form = bind_keys(game, None, "logs of events"), read_format(game)
    screen = open_screen(videos[0], game)
    columns = [form.columns[role] for role in ("time", "dx", "dy")]
    log = sort_events(logs[0], read_events(logs[0], form), columns, screen, game)
    start = log.first("start")
    if start is None and "start" in game.inputs.kinds:
        raise UserError(f"{logs[0]} has no event of the kind start ({', '.join(game.inputs.kinds['start'])})")
    zero_s = start.time if start else 0.0
    _compare_lengths(log, screen, zero_s - game.inputs.offset_s)
    return cut_by_log(name, screen, zero_s, log, keys)


def read_format(game: GameConfig) -> Format:
    """What logs call things, by the game's settings. Raises ValueError for a role or a kind that there is not."""
    inputs = game.inputs
    for setting, given, known in (("columns", inputs.columns, COLUMNS), ("kinds", inputs.kinds, WORDS)):
        if unknown := given.keys() - {*known}:
            raise UserError(f"game.inputs.{setting} has no {min(unknown)!r}; there are {', '.join(known)}")
    words: dict[str, Meaning] = {
        word: kind for kind, some in WORDS.items() if kind not in inputs.kinds for word in some
    }
    own: dict[str, Meaning] = {}
    for kind, some in cast(dict[Meaning, tuple[str, ...]], inputs.kinds).items():
        for word in some:
            if own.setdefault(word.casefold(), kind) != kind:
                raise UserError(f"game.inputs.kinds: {word!r} cannot be both {own[word.casefold()]} and {kind}")
    columns = {role: inputs.columns.get(role, role) for role in COLUMNS}
    return Format(columns, words | own, UNITS_S[inputs.time_unit], game.action_space.mouse)


def read_events(log: Path, form: Format) -> Iterator[Event]:
    """The rows in their order."""
    with opened_log(log) as text:
        rows = read_lines(log, text) if log.suffix.lower() == ".jsonl" else read_table(log, text, form)
        for line, row in rows:
            yield from read_row(row, line, f"{log} line {line}", form)


def read_lines(log: Path, text: io.TextIOWrapper) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a jsonl file with their lines; empty lines are left out."""
    for line, row in enumerate(text, 1):
        if row.strip():
            yield line, parse_object(row, f"{log} line {line}")


def read_table(log: Path, text: io.TextIOWrapper, form: Format) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a table by column with their lines; empty lines are left out."""
    reader = csv.reader(text)
    try:
        yield from _rows(log, reader, form)
    except csv.Error as error:
        raise UserError(f"{log} line {reader.line_num}: {error}") from error


def _rows(log: Path, reader: Any, form: Format) -> Iterator[tuple[int, Mapping[str, Any]]]:
    header = [name.strip() for name in next(reader, [])]
    if len({*header}) < len(header):
        raise UserError(f"{log} has two columns of one name: {header}"[:500])
    for role, column in form.columns.items():
        if column not in header and (role == "time" or role != column):
            raise UserError(f"{log} has no column {column!r} (game.inputs.columns.{role}), but {header}"[:500])
    for cells in reader:
        if cells:
            if len(cells) != len(header):
                raise UserError(f"{log} line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
            yield reader.line_num, dict(zip(header, cells, strict=True))


def read_row(row: Mapping[str, Any], line: int, where: str, form: Format) -> Iterator[Event]:
    """What one row says happened."""
    cells = {role: text for role, column in form.columns.items() if (text := _text(row.get(column)))}
    time = read_number(cells.get("time"), f"{where}: {form.columns['time']}") * form.unit_s
    kind = _word(cells, "kind", where, form) if "kind" in cells else None
    if kind not in (None, "press", "release", "change", "move"):
        if kind != "ignore":
            yield Event(time, line, kind)
        return
    names = [name for name in (_key(row.get(form.columns["key"])), _button(cells.get("button"))) if name]
    moved = kind == "move" or (kind is None and ("dx" in cells or "dy" in cells))
    if (kind == "move" and not {"dx", "dy"} & cells.keys()) or (not moved and not names):
        raise UserError(f"{where} names neither a key nor a move (game.inputs.columns, kinds)")
    if kind != "move" and names:
        down = kind if kind in ("press", "release") else _word(cells, "state", where, form)
        if down not in ("press", "release"):
            raise UserError(f"{where}: {form.columns['state']} is {cells['state'][:80]!r}, no press and no release")
        for name in names:
            yield Event(time, line, down, name)
    if moved and form.mouse:
        yield Event(time, line, "move", tuple(_move(cells, role, where, form) for role in ("dx", "dy")))


def _word(cells: Mapping[str, str], role: str, where: str, form: Format) -> Meaning:
    """The kind that the cell's word means."""
    word = cells.get(role, "")
    kind = form.words.get(word.casefold())
    if kind is None:
        raise UserError(
            f"{where}: {form.columns[role]} is {word[:80]!r}; say in game.inputs.kinds what that is: {', '.join(WORDS)}"
        )
    return kind


def _move(cells: Mapping[str, str], role: str, where: str, form: Format) -> float:
    return read_number(cells.get(role, 0), f"{where}: {form.columns[role]}")


def _key(value: Any) -> str:
    """A key's name; that of the one that types a blank is `space`."""
    return _text(value) or ("space" if value == " " else "")


def _button(name: str | None) -> str | None:
    return name if name is None or name.casefold().startswith("mouse_") else f"mouse_{name}"


def _text(value: Any) -> str:
    """A cell's text, empty for null; 1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return "" if value is None else str(value).strip()


def _compare_lengths(log: EventLog, screen: Screen, zero_s: float) -> None:
    """Raises ValueError for a log of other units or another video than `screen`; says where the two end apart."""
    times = np.concatenate([[event.time for event in log.events], log.moves[:, 0]]) - zero_s
    length = float(screen.times[-1])
    if not ((times >= 0) & (times <= length)).any():
        seen = f"its times are {times.min():g} to {times.max():g} s" if len(times) else "it has no events"
        raise UserError(
            f"{log.path}: nothing happened while {screen.video} ({length:g} s) was shown, {seen} (game.inputs."
            "time_unit, offset_s, kinds.start)"
        )
    if len(times) >= FEW and not length / ODD < np.ptp(times) < length * ODD:
        raise UserError(
            f"{log.path} lasts {np.ptp(times):g} s, {screen.video} {length:g} s; is game.inputs.time_unit right?"
        )
    apart = float(times.max()) - length
    if abs(apart) > APART_S and not log.first("stop", "end"):
        say(f"{log.path} ends {abs(apart):.1f} s {'after' if apart > 0 else 'before'} {screen.video} does")
