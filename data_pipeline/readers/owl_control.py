"""owl-control: a folder per recording with one mp4 (640 x 360, 60 fps) and `inputs.csv`.

`inputs.csv` (`timestamp,event_type,event_args`) has events, not states: unix seconds, a type and JSON arguments, as the
recorder writes them. `KEYBOARD` [key, pressed], `MOUSE_BUTTON` [button, pressed], `MOUSE_MOVE` [dx, dy] in pixels (x to
the right, y downwards), `START` and `END` with the keys that are held then, `VIDEO_START` and `VIDEO_END`, `FOCUS` and
`UNFOCUS`; others are passed over. Keys and buttons are Windows' virtual-key codes; one that has no name here can be
bound as `code_<number>`.

Frame i is on the screen from its time in the video, counted from `VIDEO_START` (without one: `START`), to that of frame
i + 1, and action i is what happened in that interval: the sum of the mouse's moves; a key is held in the frames half of
which it was down, and if there is none, in the one that its press filled most. While the window has no focus nothing is
logged: those frames are left out, and an episode ends there. The same where the video has a gap of more than half a
frame, and where it goes on after the log's end.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import storage
from data_pipeline.readers.keys import bind_keys, mouse_rows, require_mouse_scale
from data_pipeline.readers.recording import (
    Recording,
    VideoEpisode,
    check_rate,
    cut_video,
    find_spans,
    list_files,
    list_folders,
    parse_json_value,
    read_csv,
    read_number,
)
from data_pipeline.types import Actions, GameConfig
from data_pipeline.video import frame_times, probe

LOG, COLUMNS = "inputs.csv", ["timestamp", "event_type", "event_args"]
SHORT_S = 1.0  # a video that ends this much before its log is truncated
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


class Event(NamedTuple):
    """One row."""

    where: str  # file and line
    time: float  # unix seconds
    kind: str
    args: Any  # as JSON


class Press(NamedTuple):
    """A key from down to up."""

    where: str
    name: str
    down: float  # unix seconds
    up: float


def find_recordings(source: str | Path) -> list[Recording]:
    """The folders with an `inputs.csv` directly in `source`; `source` itself if it has one."""
    folders = [storage.path(source)] if list_files(source, LOG) else list_folders(source)
    if not folders:
        raise ValueError(f"{source} holds no folders with an mp4 and {LOG}")
    return [Recording(folder.name, partial(read_folder, folder)) for folder in folders]


def read_folder(folder: Path, game: GameConfig) -> list[VideoEpisode]:
    """The episodes of `folder` between losses of focus and gaps of the video.

    Raises ValueError in one line: a damaged row, times out of order, another fps, a video shorter than its log, a key
    that the game does not have.
    """
    require_mouse_scale(game, "owl-control recordings")
    keys = bind_keys(game, INPUTS, "owl-control recordings")
    videos = list_files(folder, ".mp4")
    if len(videos) != 1:
        raise ValueError(f"{folder} must hold one mp4, not {len(videos)}")
    log, info, times = folder / LOG, probe(videos[0]), frame_times(videos[0])
    check_rate(videos[0], 1 / float(np.median(np.diff(times))) if len(times) > 1 else 0.0, game)  # whatever is left out
    events = list(read_events(log))
    shown = times - times[0] + find_event(events, log, "VIDEO_START", "START").time
    gaps = np.diff(shown, append=np.inf) > 1.5 / game.fps
    end = find_event(events, log, "VIDEO_END", "END").time
    if shown[-1] < end - SHORT_S:
        raise ValueError(f"{videos[0]} is truncated: it ends {end - shown[-1]:.1f} s before {log} does")
    # Intervals are between neighbouring edges: those of the frames, and those of gaps.
    edges = np.sort(np.concatenate([shown, shown[gaps] + 1 / game.fps]))
    frames = np.searchsorted(edges, shown)
    keyboard = np.zeros((len(edges) - 1, len(game.action_space.keys)), dtype=np.float32)
    for press in find_presses(events):
        chosen = intervals_held(press, edges)
        keyboard[chosen] = np.maximum(keyboard[chosen], keys.row([press.name], press.where))
    degrees = sum_moves(events, edges) * (game.inputs.pitch_deg, game.inputs.yaw_deg)
    actions = Actions(keyboard[frames], mouse_rows(game, degrees[frames]))
    spans = find_spans(find_logged(events, edges)[frames], np.roll(gaps, 1))
    return cut_video(folder.name, videos[0], info, game, actions, spans)


def read_events(log: Path) -> Iterator[Event]:
    """The rows in order."""
    header, rows = read_csv(log)
    if header != COLUMNS:
        raise ValueError(f"{log}: columns must be {','.join(COLUMNS)}, not {','.join(header)}")
    before = -np.inf
    for line, (timestamp, kind, args) in rows:
        where = f"{log} line {line}"
        time = read_number(timestamp, f"{where}: timestamp")
        if time < before:
            raise ValueError(f"{where}: timestamp {timestamp} is {before - time:.3f} s before the line above")
        before = time
        yield Event(where, time, kind.strip(), parse_json_value(args or "null", where))


def find_event(events: Sequence[Event], log: Path, *kinds: str) -> Event:
    """The first event of the first of `kinds` that occurs."""
    for kind in kinds:
        for event in events:
            if event.kind == kind:
                return event
    raise ValueError(f"{log} has no {' and no '.join(kinds)}; nobody knows which part of the video it belongs to")


def find_presses(events: Sequence[Event]) -> list[Press]:
    """Every key and button from its press to its release, to a loss of focus, or to the log's end."""
    held: dict[str, Event] = {}
    presses = []
    for event in events:
        if event.kind in ("UNFOCUS", "END") or event is events[-1]:
            presses += [Press(press.where, name, press.time, event.time) for name, press in held.items()]
            held.clear()
        for name, down in _changes(event):
            if down:
                held.setdefault(name, event)  # a key that is held repeats its press
            elif name in held:
                presses.append(Press(held[name].where, name, held[name].time, event.time))
                del held[name]
    return presses


def intervals_held(press: Press, edges: np.ndarray) -> np.ndarray:
    """The numbers of the intervals in which the press counts; number i lasts from `edges[i]` to `edges[i + 1]`."""
    if press.down >= edges[-1] or press.up <= edges[0]:
        return np.zeros(0, dtype=int)
    first = max(int(np.searchsorted(edges, press.down, side="right")) - 1, 0)
    last = min(max(int(np.searchsorted(edges, press.up, side="left")) - 1, first), len(edges) - 2)
    touched = np.arange(first, last + 1)
    filled = np.minimum(edges[touched + 1], press.up) - np.maximum(edges[touched], press.down)
    half = touched[filled >= (edges[touched + 1] - edges[touched]) / 2]
    return half if len(half) else touched[[np.argmax(filled)]]


def sum_moves(events: Sequence[Event], edges: np.ndarray) -> np.ndarray:
    """How far the mouse moved in each interval, (n 2) pixels: down, to the right."""
    moves = [(event.time, *_pair(event, int | float)) for event in events if event.kind == "MOUSE_MOVE"]
    table = np.array(moves, dtype=np.float64).reshape(-1, 3)
    numbers = np.searchsorted(edges, table[:, 0], side="right") - 1
    inside = (numbers >= 0) & (numbers < len(edges) - 1)
    summed = np.zeros((len(edges) - 1, 2))
    np.add.at(summed, numbers[inside], table[inside][:, [2, 1]])
    return summed


def find_logged(events: Sequence[Event], edges: np.ndarray) -> np.ndarray:
    """Whether all of an interval was logged, (n) bool."""
    kept = np.ones(len(edges) - 1, dtype=bool)
    since = -np.inf  # nothing is logged from here on
    for event in events:
        begins, ends = event.kind in ("UNFOCUS", "END"), event.kind in ("FOCUS", "START")
        if ends and since is not None:
            kept &= (edges[1:] <= since) | (edges[:-1] >= event.time)
            since = None
        elif begins and since is None:
            since = event.time
    return kept if since is None else kept & (edges[1:] <= since)


def _changes(event: Event) -> list[tuple[str, bool]]:
    """The keys and buttons that the event presses or releases."""
    if event.kind == "START" and isinstance(event.args, dict):
        held = [(names, event.args.get(kind, [])) for names, kind in ((KEYS, "keyboard"), (BUTTONS, "mouse"))]
        if not all(isinstance(codes, list) and all(isinstance(code, int) for code in codes) for _, codes in held):
            raise ValueError(f"{event.where}: START has the arguments {event.args!r}; keyboard and mouse hold numbers")
        return [(names.get(code, CODE.format(code)), True) for names, codes in held for code in codes]
    names = {"KEYBOARD": KEYS, "MOUSE_BUTTON": BUTTONS}.get(event.kind)
    if names is None:
        return []
    code, down = _pair(event, int)
    return [(names.get(code, CODE.format(code)), bool(down))]


def _pair(event: Event, kind: Any) -> tuple[Any, Any]:
    if not isinstance(event.args, list) or len(event.args) != 2 or not all(isinstance(one, kind) for one in event.args):
        raise ValueError(f"{event.where}: {event.kind} has the arguments {event.args!r}, not two numbers")
    return event.args[0], event.args[1]
