"""Events to rows: what a log of presses and moves says was done while each frame of a video was on the screen.

Frame i is on the screen from its time in the video to that of frame i + 1, and action i is what happened in that
interval: the sum of the mouse's moves; a key is held in the frames half of which it was down, and if there is none, in
the one that its press filled most. Frames in whose interval nothing was logged are left out, and an episode ends there.
The same where the video has a gap of more than half a frame.

Clocks are corrected and threads overtake each other, so events are put in the order of their times. One that is more
than a second before an event above it is refused: that log has two clocks.
"""

import re
from array import array
from collections.abc import Iterable
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from configs.errors import UserError
from configs.game import EventKind, GameConfig
from data_pipeline.readers.keys import KeyMap, scale_mouse
from data_pipeline.readers.recording import check_rate, cut_episodes, say
from data_pipeline.types import Actions, Episode, Footage
from data_pipeline.video import frame_times, probe

BACK_S = 1.0  # an event may be so much before one that stands above it
SHORT_S = 1.0  # a video that ends this much before its log is truncated
SLACK_S = 1e-3  # of an interval may lack; clocks of seconds since 1970 and of videos are rounded
# A key that holds nothing, pressed so shortly before the log's end, is the one that stops the recorder. A function key,
# or one that is not released, may be pressed earlier, since the video is finished first.
HOTKEY_S, STOP_KEY_S = 0.25, 2.0
FUNCTION_KEY = re.compile(r"f\d{1,2}", re.IGNORECASE)
# Mice report up to 8,000 times a second. A log of more is of another video, or none, and not worth reading to its end.
MOST_EVENTS, MOST_EVENTS_PER_S = 200_000, 20_000
Kind = EventKind | Literal["hook"]  # hook: pictures before are black


class Event(NamedTuple):
    """One thing that happened."""

    time: float  # s, by the log's clock
    where: str  # file and line
    kind: Kind
    value: Any = None  # press, release: the input's name; move: (x, y), to the right and down


class EventLog(NamedTuple):
    """Everything that happened while a video was recorded, in the order of time."""

    path: Path
    footage: Footage
    times: np.ndarray  # (n) s since the video's first frame, when each of its frames is shown
    events: list[Event]  # without moves
    moves: np.ndarray  # (n 3) s, x, y

    def first(self, *kinds: Kind) -> Event | None:
        """The first event of the first of `kinds` that occurs."""
        return next((event for kind in kinds for event in self.events if event.kind == kind), None)


def sort_events(video: Path, path: Path, events: Iterable[Event], game: GameConfig) -> EventLog:
    """The `events` of a video's log in the order of time; those of one time stay in the order of the file.

    The video is looked at first, which is cheap beside reading the log. A UserError for more events than the
    video can have.
    """
    footage, times = probe(video), frame_times(video)
    check_rate(video, times, game)
    times = times - times[0]
    most = MOST_EVENTS + int(MOST_EVENTS_PER_S * times[-1])
    latest, others, moves = -np.inf, [], array("d")
    for count, event in enumerate(events, 1):
        if count > most:
            raise UserError(f"{event.where}: too many events for {len(times)} frames of {video}")
        if event.time < latest - BACK_S:
            late_s = latest - event.time
            raise UserError(f"{event.where}: its time is {late_s:.3f} s before a row above; split the recording there")
        latest = max(latest, event.time)
        if event.kind == "move":
            moves.extend((event.time, *event.value))
        else:
            others.append(event)
    others.sort(key=lambda event: event.time)
    return EventLog(path, footage, times, others, np.array(moves).reshape(-1, 3))


def cut_by_log(name: str, log: EventLog, zero_s: float, keys: KeyMap) -> list[Episode]:
    """The episodes of a video whose clock is at 0 when the log's is at `zero_s`; `game.inputs.offset_s` comes on top.

    A UserError for a video that is shorter than its log and for an input that holds no key.
    """
    game, video = keys.game, log.footage.path
    shown = log.times + zero_s - game.inputs.offset_s
    stop = log.first("stop", "end")
    if stop and shown[-1] < stop.time - SHORT_S:
        raise UserError(f"{video} is truncated: it ends {stop.time - shown[-1]:.1f} s before {log.path} does")
    gaps = np.diff(shown, append=np.inf) > 1.5 / game.fps
    # Intervals are between neighbouring edges: those of the frames, and those of gaps.
    edges = np.sort(np.concatenate([shown, shown[gaps] + 1 / game.fps]))
    frames = np.arange(len(shown)) + np.cumsum(gaps) - gaps
    logged = find_logged(log)
    keyboard, moves = hold_keys(log, keys, logged, edges)[frames], sum_moves(log.moves, edges)[frames]
    actions = Actions(keyboard, scale_mouse(game, moves, lambda i: f"{log.path}: frame {i}"))
    episodes = cut_episodes(name, log.footage, actions, cover_logged(logged, edges)[frames], np.roll(gaps, 1))
    if not episodes:
        say(f"{log.path}: nothing was logged while {video} was shown; it is left out")
    return episodes


def hold_keys(log: EventLog, keys: KeyMap, logged: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Which keys are held in each interval, (n k) of 0 and 1; a UserError for an input that holds no key.

    Those that start or stop the recorder do not count: see `HOTKEY_S`.
    """
    keyboard = np.zeros((len(edges) - 1, len(keys.game.action_space.keys)), dtype=np.float32)
    for press, up in find_presses(log, keys):
        if press.value in keys.elements:
            held = held_intervals(press.time, up, edges)
            keyboard[held[:, None], keys.elements[press.value]] = 1
            continue
        stops = (up >= logged[:, 1]) | bool(FUNCTION_KEY.fullmatch(press.value))
        until = logged[:, 1] - np.where(stops, STOP_KEY_S, HOTKEY_S)
        if ((logged[:, 0] + HOTKEY_S < press.time) & (press.time < until)).any():
            keys.row([press.value], press.where)  # refuses it, unless others are dropped
    return keyboard


def find_presses(log: EventLog, keys: KeyMap) -> list[tuple[Event, float]]:
    """Every press with the time at which it ends: its release, a pause, the log's end, or never."""
    held: dict[str, Event] = {}
    folded: dict[str, str] = {}  # names as they were pressed last
    presses = []
    for event in log.events:
        if event.kind in ("pause", "end"):
            presses += [(press, event.time) for press in held.values()]
            held.clear()
        elif event.kind in ("press", "release"):
            name = keys.spell(event.value, event.where)
            if event.kind == "press":
                held.setdefault(name, event._replace(value=name))  # a held key repeats its press
                folded[name.casefold()] = name
                continue
            if name not in held:  # Shift may change the letter between press and release
                name = folded.get(name.casefold(), name)
            if name in held:
                presses.append((held.pop(name), event.time))
    return presses + [(press, np.inf) for press in held.values()]


def held_intervals(down: float, up: float, edges: np.ndarray) -> np.ndarray:
    """The numbers of the intervals in which a press from `down` to `up` counts: those that it fills by half, or the one
    that it fills most. Interval i lasts from `edges[i]` to `edges[i + 1]`."""
    if down >= edges[-1] or up <= edges[0]:
        return np.zeros(0, dtype=int)
    first = max(int(np.searchsorted(edges, down, side="right")) - 1, 0)
    last = max(int(np.searchsorted(edges[:-1], up, side="left")) - 1, first)
    begins, ends = edges[first : last + 1], edges[first + 1 : last + 2]
    filled = np.minimum(ends, up) - np.maximum(begins, down)
    half = np.flatnonzero(2 * filled >= ends - begins)
    return first + (half if len(half) else np.flatnonzero(filled == filled.max())[:1])


def sum_moves(moves: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How far the mouse moved in each interval, (n 2): y (down), x (to the right)."""
    moves = moves[(moves[:, 0] >= edges[0]) & (moves[:, 0] < edges[-1])]
    numbers = np.searchsorted(edges, moves[:, 0], side="right") - 1
    return np.stack([np.bincount(numbers, moves[:, axis], len(edges) - 1) for axis in (2, 1)], axis=1)


def find_logged(log: EventLog) -> np.ndarray:
    """From when to when everything was logged, and the video shows something, (m 2) seconds by the log's clock.

    A log that does not say when it begins is one that began before the video; the same with its end.
    """
    starts, ends = ("begin", "resume"), ("pause", "end")
    switches = [(event.time, event.kind in starts) for event in log.events if event.kind in starts + ends]
    before = not switches or not switches[0][1]
    switches = [(-np.inf, before), *switches, (np.inf, False)]
    changes = [next(same) for _, same in groupby(switches, itemgetter(1))]
    spans = [(since, until) for (since, logged), (until, _) in pairwise(changes) if logged]
    hook = log.first("hook")
    return np.maximum(np.array(spans), hook.time if hook else -np.inf)


def cover_logged(logged: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Whether all of an interval lies in one of the spans `logged` (m 2), (n) bool."""
    covered = np.zeros(len(edges) - 1, dtype=bool)
    for since, until in logged:
        covered |= (edges[:-1] >= since - SLACK_S) & (edges[1:] <= until + SLACK_S)
    return covered
