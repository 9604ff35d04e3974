"""owl-control: a folder per recording with one video (640 x 360, 60 fps) and `inputs.csv`.

`inputs.csv` (`timestamp,event_type,event_args`) has events, not states: unix seconds, a type and JSON arguments, quoted
as CSV asks for (the recorder's versions 1.0), quoted without doubling the quotes within (since 1.1.0), or bare.
`KEYBOARD` [key, pressed], `MOUSE_BUTTON` [button, pressed], `MOUSE_MOVE` [dx, dy] in pixels (x to the right, y
downwards), `START` with the `inputs` that are held then, `END`, `VIDEO_START` and `VIDEO_END`, `HOOK_START` (pictures
before are black), and in 1.0.0 and 1.0.1 `UNFOCUS` and `REFOCUS` (`FOCUS`); others are passed over unread. Keys and
buttons are Windows' virtual-key codes; one that has no name here can be bound as `code_<number>`.

The video's first frame is at `VIDEO_START`. Without one it is taken to be at `START`, which was 7 frames off in a
published recording: `game.inputs.offset_s` mends that. How events become frames: event_rows.py.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from configs import storage
from configs.errors import UserError
from configs.foreign import parse_json
from configs.game import GameConfig
from data_pipeline.readers.event_rows import Event, Kind, cut_by_log, open_screen, opened_log, sort_events
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
KEYS = {
    **{code: chr(code).lower() for code in (*range(0x30, 0x3A), *range(0x41, 0x5B))},
    **{0x60 + i: f"keypad_{i}" for i in range(10)},
    **{0x70 + i: f"f{i + 1}" for i in range(24)},
    **dict(zip(range(0x21, 0x29), ("page_up", "page_down", "end", "home", "left", "up", "right", "down"), strict=True)),
    **dict(zip(range(0x10, 0x15), ("left_shift", "left_control", "left_alt", "pause", "caps_lock"), strict=True)),
    **dict(zip(range(0xA0, 0xA4), ("left_shift", "right_shift", "left_control", "right_control"), strict=True)),
    0x08: "backspace",
    0x09: "tab",
    0x0D: "enter",
    0x1B: "escape",
    0x20: "space",
    0x2C: "print_screen",
    0x2D: "insert",
    0x2E: "delete",
    0x5B: "left_win",
    0x5C: "right_win",
    0x5D: "menu",
    0x6A: "keypad_multiply",
    0x6B: "keypad_add",
    0x6D: "keypad_subtract",
    0x6E: "keypad_decimal",
    0x6F: "keypad_divide",
    0x90: "num_lock",
    0x91: "scroll_lock",
    0xA4: "left_alt",
    0xA5: "right_alt",
    0xBA: "semicolon",
    0xBB: "equal",
    0xBC: "comma",
    0xBD: "minus",
    0xBE: "period",
    0xBF: "slash",
    0xC0: "grave_accent",
    0xDB: "left_bracket",
    0xDC: "backslash",
    0xDD: "right_bracket",
    0xDE: "apostrophe",
    0xE2: "world_2",
}
CODE = "code_{}"  # one without a name
INPUTS = frozenset((*KEYS.values(), *BUTTONS.values(), *(CODE.format(i) for i in range(256) if i not in KEYS)))


def find_recordings(source: str | Path) -> list[Recording]:
    """The folders with a video and an `inputs.csv` directly in `source`; `source` itself if it has the latter.

    Those that the recorder or its server marked as invalid are left out, and what is no recording, and said.
    """
    folders = [storage.path(source)] if (storage.path(source) / LOG).is_file() else list_folders(source)
    names = {folder: [folder.name, *(path.name for path in folder.iterdir())] for folder in folders}
    invalid = [folder for folder, held in names.items() if any(name.endswith(MARKS) for name in held)]
    say_left_out(source, invalid, "marked by the recorder as invalid")
    strays = [one for one in folders if not (one / LOG).is_file() and not list_files(one, *VIDEOS)]
    say_left_out(source, strays, f"neither a video nor {LOG}")
    found = sorted({*folders} - {*invalid, *strays})
    if not found:
        raise UserError(f"{source} holds no folders with a video and {LOG}")
    return [Recording(folder.name, partial(read_folder, folder)) for folder in found]


def read_folder(folder: Path, game: GameConfig) -> list[VideoEpisode]:
    """The episodes of `folder` between losses of focus and gaps of the video.

    Raises ValueError in one line: a damaged row, times out of order, another fps, a video shorter than its log, a key
    that the game does not have.
    """
    require_mouse_scale(game, "owl-control recordings")
    keys = bind_keys(game, INPUTS, "owl-control recordings")
    videos, path = list_files(folder, *VIDEOS), folder / LOG
    if len(videos) != 1:
        raise UserError(f"{folder} must hold one video, not {len(videos)}")
    screen = open_screen(videos[0], game)
    log = sort_events(
        path, read_events(path, game.action_space.mouse), ("timestamp", *["event_args"] * 2), screen, game
    )
    start, stop = log.first("start", "begin"), log.first("stop", "end")
    if start is None or stop is None:
        missing = "VIDEO_START and no START" if start is None else "VIDEO_END and no END"
        raise UserError(f"{path} has no {missing}; nobody knows which part of the video it belongs to")
    if start.kind == "begin" and not game.inputs.offset_s:
        say(
            f"{path} has no VIDEO_START: the video is taken to begin at START, which may be some frames off; let the "
            "doctor measure it and set game.inputs.offset_s"
        )
    return cut_by_log(folder.name, screen, start.time, log, keys)


def read_events(log: Path, mouse: bool = True) -> Iterator[Event]:
    """The rows in their order, those of kinds that count; moves only if the `mouse` does."""
    with opened_log(log) as text:
        for line, row in enumerate(text, 1):
            cells = row.strip().split(",", 2)
            where = f"{log} line {line}"
            if line == 1:
                if [cell.strip('" ') for cell in cells] != COLUMNS:
                    raise UserError(f"{log}: columns must be {','.join(COLUMNS)}, not {row.strip()[:80]!r}")
            elif cells != [""]:
                if len(cells) != len(COLUMNS):
                    raise UserError(f"{where}: {len(cells)} cells, the header has {len(COLUMNS)}")
                kind = cells[1].strip('" ')
                if not KIND.fullmatch(kind):  # it may have been a kind that counts
                    raise UserError(f"{where} is damaged: event_type is {kind[:80]!r}")
                if kind in KINDS or kind in ("KEYBOARD", "MOUSE_BUTTON") or (kind == "MOUSE_MOVE" and mouse):
                    yield from _events(
                        line, read_number(cells[0].strip('" '), f"{where}: timestamp"), kind, cells[2], where
                    )


def _events(line: int, time: float, kind: str, args: str, where: str) -> Iterator[Event]:
    """What one row says."""
    if kind in KINDS:
        yield Event(time, line, KINDS[kind])
        for name in _held(_parse(args, where), where) if kind == "START" else []:
            yield Event(time, line, "press", name)
        return
    pair = _parse(args, where)
    codes = kind != "MOUSE_MOVE"
    if not isinstance(pair, list) or len(pair) != 2 or (codes and (type(pair[0]) is not int or pair[1] not in (0, 1))):
        wanted = "a code and whether it is pressed" if codes else "two numbers"
        raise UserError(f"{where}: {kind} has the arguments {str(pair)[:80]}, not {wanted}")
    if codes:
        names = KEYS if kind == "KEYBOARD" else BUTTONS
        yield Event(time, line, "press" if pair[1] else "release", names.get(pair[0], CODE.format(pair[0])))
    else:
        yield Event(time, line, "move", tuple(read_number(one, f"{where}: {kind}") for one in pair))


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
