"""owl-control: a folder per recording with one video (640 x 360, 60 fps) and `inputs.csv`.

`inputs.csv` (`timestamp,event_type,event_args`) has events, not states: unix seconds, a type and JSON arguments, quoted
as CSV asks for (the recorder's versions 1.0), quoted without doubling the quotes within (since 1.1.0), or bare.
`KEYBOARD` [key, pressed], `MOUSE_BUTTON` [button, pressed], `MOUSE_MOVE` [dx, dy] in pixels (x to the right, y
downwards), `START` with the `inputs` that are held then, `END`, `VIDEO_START` and `VIDEO_END`, `HOOK_START` (pictures
before are black), and in 1.0.0 and 1.0.1 `UNFOCUS` and `REFOCUS` (`FOCUS`); others are not read. Keys and
buttons are Windows' virtual-key codes; one that has no name here can be bound as `code_<number>`.

The video's first frame is at `VIDEO_START`. Without one it is taken to be at `START`, which was 7 frames off in a
published recording: `game.inputs.offset_s` mends that. How events become frames: event_rows.py.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.foreign import parse_json
from configs.game import GameConfig
from data_pipeline.readers.event_rows import EVENT_BYTES, Event, Kind, cut_by_log, open_screen, sort_events
from data_pipeline.readers.keys import bind_keys
from data_pipeline.readers.logs import open_text, read_number
from data_pipeline.readers.recording import (
    VIDEOS,
    Format,
    Recording,
    find_folders,
    list_files,
    list_names,
    read_pair,
    say,
)
from data_pipeline.types import Episode

LOG, COLUMNS = "inputs.csv", ["timestamp", "event_type", "event_args"]
# Empty files with which the recorder and its server mark a recording that is not to be used.
MARKS = (".invalid", ".server_invalid")
KINDS: dict[str, Kind] = {
    "START": "begin",
    "END": "end",
    "VIDEO_START": "start",
    "VIDEO_END": "stop",
    "HOOK_START": "hook",
    "UNFOCUS": "pause",
    "FOCUS": "resume",
    "REFOCUS": "resume",
}
KIND = re.compile(r"[A-Za-z]\w*", re.ASCII)
BUTTONS = {1: "mouse_left", 2: "mouse_right", 4: "mouse_middle", 5: "mouse_4", 6: "mouse_5"}
# https://learn.microsoft.com/windows/win32/inputdev/virtual-key-codes; a key that says no side is the left one.
NAMED = """
    08 backspace  09 tab  0D enter  10 left_shift  11 left_control  12 left_alt  13 pause  14 caps_lock  1B escape
    20 space  21 page_up  22 page_down  23 end  24 home  25 left  26 up  27 right  28 down  2C print_screen  2D insert
    2E delete  5B left_win  5C right_win  5D menu  6A keypad_multiply  6B keypad_add  6D keypad_subtract
    6E keypad_decimal  6F keypad_divide  90 num_lock  91 scroll_lock  A0 left_shift  A1 right_shift  A2 left_control
    A3 right_control  A4 left_alt  A5 right_alt  BA semicolon  BB equal  BC comma  BD minus  BE period  BF slash
    C0 grave_accent  DB left_bracket  DC backslash  DD right_bracket  DE apostrophe  E2 world_2
"""
KEYS = {
    **{code: chr(code).lower() for code in (*range(0x30, 0x3A), *range(0x41, 0x5B))},
    **{0x60 + i: f"keypad_{i}" for i in range(10)},
    **{0x70 + i: f"f{i + 1}" for i in range(24)},
    **{int(code, 16): name for code, name in re.findall(r"(\w\w) (\w+)", NAMED)},
}
CODE = "code_{}"  # one without a name
INPUTS = frozenset((*KEYS.values(), *BUTTONS.values(), *(CODE.format(i) for i in range(256) if i not in KEYS)))


def find_recordings(source: str | Path) -> list[Recording]:
    """The folders with a video or an `inputs.csv` directly in `source`; `source` itself if it has the latter.

    Those that the recorder or its server marked as invalid are left out.
    """
    folders = find_folders(source, f"a video and {LOG}", lambda folder: bool(list_files(folder, *VIDEOS)), log=LOG)
    invalid = [folder for folder in folders if any(path.name.endswith(MARKS) for path in (folder, *folder.iterdir()))]
    if invalid:
        say(f"{source}: left out {list_names([folder.name for folder in invalid])}: marked by the recorder as invalid")
    folders = [folder for folder in folders if folder not in invalid]
    if not folders:
        raise UserError(f"{source} holds no recordings but those that are marked as invalid")
    files = {folder.name: [*list_files(folder, *VIDEOS), folder / LOG] for folder in folders}
    return [Recording(name, partial(read_pair, name, files[name], read_recording)) for name in files]


FORMAT = Format(find_recordings, scaled_mouse=True)


def read_recording(name: str, video: Path, log: Path, game: GameConfig) -> list[Episode]:
    """The episodes between losses of focus and gaps of the video."""
    keys, screen = bind_keys(game, INPUTS), open_screen(video, game)
    events = sort_events(log, read_events(log, game.action_space.mouse), screen, game)
    start, stop = events.first("start", "begin"), events.first("stop", "end")
    if start is None or stop is None:
        missing = "VIDEO_START and no START" if start is None else "VIDEO_END and no END"
        raise UserError(f"{log} has no {missing}; it is unknown which part of the video it belongs to")
    if start.kind == "begin" and not game.inputs.offset_s:
        taken = "the video is taken to begin at START, which may be some frames off"
        say(f"{log} has no VIDEO_START: {taken}; let the doctor measure it and set game.inputs.offset_s")
    return cut_by_log(name, screen, start.time, events, keys)


def read_events(log: Path, mouse: bool = True) -> Iterator[Event]:
    """The rows in their order, those of kinds that count; moves only if the `mouse` does."""
    with open_text(log, EVENT_BYTES) as text:
        header = next(text, "").strip()
        if [cell.strip('" ') for cell in header.split(",")] != COLUMNS:
            raise UserError(f"{log}: columns must be {','.join(COLUMNS)}, not {header[:80]!r}")
        for number, row in enumerate(text, 2):
            where, cells = f"{log} line {number}", row.strip().split(",", 2)
            if cells == [""]:
                continue
            if len(cells) != len(COLUMNS):
                raise UserError(f"{where}: {len(cells)} cells, the header has {len(COLUMNS)}")
            time, kind = (cell.strip('" ') for cell in cells[:2])
            if not KIND.fullmatch(kind):  # it may have been a kind that counts
                raise UserError(f"{where} is damaged: event_type is {kind[:80]!r}")
            if kind in KINDS or kind in ("KEYBOARD", "MOUSE_BUTTON") or (kind == "MOUSE_MOVE" and mouse):
                yield from _events(read_number(time, f"{where}: timestamp"), where, kind, cells[2])


def _events(time: float, where: str, kind: str, args: str) -> Iterator[Event]:
    """What one row says."""
    if kind in KINDS:
        yield Event(time, where, KINDS[kind])
        for name in _held(_parse(args, where), where) if kind == "START" else []:
            yield Event(time, where, "press", name)
        return
    pair, is_move = _parse(args, where), kind == "MOUSE_MOVE"
    if not isinstance(pair, list) or len(pair) != 2:
        raise UserError(f"{where}: {kind} has the arguments {str(pair)[:80]}, not two")
    if is_move:
        yield Event(time, where, "move", [read_number(part, f"{where}: {kind}") for part in pair])
        return
    code, pressed = pair
    if type(code) is not int or pressed not in (0, 1):
        raise UserError(f"{where}: {kind} has the arguments {str(pair)[:80]}, not a code and whether it is pressed")
    names = KEYS if kind == "KEYBOARD" else BUTTONS
    yield Event(time, where, "press" if pressed else "release", names.get(code, CODE.format(code)))


def _held(args: Any, where: str) -> list[str]:
    """The keys and buttons that are held when the log begins; versions 1.0 say nothing about them."""
    inputs = args.get("inputs", args) if isinstance(args, dict) else {}
    names = []
    for kind, named in (("keyboard", KEYS), ("mouse", BUTTONS)):
        codes = inputs.get(kind, []) if isinstance(inputs, dict) else None
        if not isinstance(codes, list) or not all(type(code) is int for code in codes):
            raise UserError(f"{where}: START has the arguments {str(args)[:80]}; keyboard and mouse hold numbers")
        names += [named.get(code, CODE.format(code)) for code in codes]
    return names


def _parse(args: str, where: str) -> Any:
    """A row's arguments: JSON, quoted or not, the quotes within doubled or not."""
    text = args.strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    try:
        return parse_json(text or "null", where)
    except ValueError:
        if '""' not in text:
            raise
        return parse_json(text.replace('""', '"'), where)
