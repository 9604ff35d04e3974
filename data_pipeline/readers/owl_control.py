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

import operator
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.game import GameConfig
from configs.untrusted import parse_json, reading
from data_pipeline.readers.event_rows import Event, Kind, cut_by_log, sort_events
from data_pipeline.readers.keys import bind_keys
from data_pipeline.readers.logs import EVENT_BYTES, open_text, read_number
from data_pipeline.readers.recording import Format, find_pairs_or_folders, list_names, read_pair, say
from data_pipeline.types import Episode

LOG, COLUMNS = "inputs.csv", ["timestamp", "event_type", "event_args"]
# Empty files with which the recorder and its server mark a recording that is not to be used.
MARKS = (".invalid", ".server_invalid")
KINDS: dict[str, Kind] = {
    "START": "begin", "END": "end", "VIDEO_START": "start", "VIDEO_END": "stop", "HOOK_START": "hook",
    "UNFOCUS": "pause", "FOCUS": "resume", "REFOCUS": "resume",
}  # fmt: skip
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
NAMES = {"KEYBOARD": KEYS, "MOUSE_BUTTON": BUTTONS}
PRESSED: dict[Any, Kind] = {True: "press", False: "release"}
CODE = "code_{}"  # of a key or button without a name
INPUTS = frozenset((*KEYS.values(), *BUTTONS.values(), *(CODE.format(i) for i in range(256) if i not in KEYS)))


def find_recordings(source: str | Path) -> dict[str, list[Path]]:
    """The folders with a video or an `inputs.csv` directly in `source`, or `source` itself if it has both.

    Those that the recorder or its server marked as invalid are left out.
    """
    recordings = find_pairs_or_folders(source, [f"/{LOG}"])
    folders = {name: files[0].parent for name, files in recordings.items()}
    marked = [name for name, f in folders.items() if any(path.name.endswith(MARKS) for path in (f, *f.iterdir()))]
    if marked:
        say(f"{source}: left out {list_names(marked)}: marked by the recorder as invalid")
    return {name: files for name, files in recordings.items() if name not in marked}


def read_recording(name: str, video: Path, log: Path, game: GameConfig) -> list[Episode]:
    """The episodes between losses of focus and gaps of the video."""
    keys = bind_keys(game, INPUTS)
    events = sort_events(video, log, read_events(log), game)
    start = events.first("start", "begin")
    if start is None or not events.first("stop", "end"):
        missing = "VIDEO_START and no START" if start is None else "VIDEO_END and no END"
        raise UserError(f"{log} has no {missing}; it is unknown which part of the video it belongs to")
    if start.kind == "begin" and not game.inputs.offset_s:
        taken = "the video is taken to begin at START, which may be some frames off"
        say(f"{log} has no VIDEO_START: {taken}; let the doctor measure it and set game.inputs.offset_s")
    return cut_by_log(name, events, start.time, keys)


FORMAT = Format(find_recordings, partial(read_pair, read_recording))


def read_events(log: Path) -> Iterator[Event]:
    """The rows in their order, those of kinds that count."""
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
            if kind in KINDS or kind in NAMES or kind == "MOUSE_MOVE":
                with reading(where, f"the arguments of {kind} are {cells[2]:.80}"):
                    at = read_number(time, f"{where}: timestamp")
                    yield from (Event(at, where, *event) for event in _events(where, kind, cells[2]))


def _events(where: str, kind: str, args: str) -> Iterator[tuple[Kind, Any]]:
    """Kind and value of each event that a row's arguments hold."""
    if kind in KINDS:
        yield KINDS[kind], None
    if kind == "START":  # versions 1.0 do not say what is held then
        start = _parse(args, where)
        inputs = start.get("inputs", start) if isinstance(start, dict) else {}
        for device, part in (("KEYBOARD", "keyboard"), ("MOUSE_BUTTON", "mouse")):
            for code in inputs.get(part, []):
                yield "press", _name(device, code)
    elif kind == "MOUSE_MOVE":
        dx, dy = (read_number(part, f"{where}: {kind}") for part in _parse(args, where))
        yield "move", (dx, dy)
    elif kind in NAMES:
        code, pressed = _parse(args, where)
        yield PRESSED[pressed], _name(kind, code)


def _name(device: str, code: Any) -> str:
    return NAMES[device].get(operator.index(code), CODE.format(code))


def _parse(args: str, where: str) -> Any:
    """A row's arguments: JSON, quoted or not, the quotes within doubled or not."""
    text = args.strip().strip('"') or "null"
    try:
        return parse_json(text, where)
    except UserError:
        return parse_json(text.replace('""', '"'), where)
