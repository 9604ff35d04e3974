"""GameFactory's GF-Minecraft: `video/<name>.mp4` and `metadata/<name>.json` (seed_*_part_*) in one folder, 16 fps.

`actions` in the json has entries "0", "1", ...: `ws` (0 nothing, 1 forward, 2 back), `ad` (1 left, 2 right), `scs` (1
jump, 2 sneak, 3 sprint), `pitch_delta` and `yaw_delta` (x 15 degrees; a game without a mouse needs none), and a pose.
The dataset's description says that entry 0 is to be ignored, which is so if an entry is the action that led to its
frame: nothing led to frame 0. So entry i leads from frame i - 1 to frame i, and action i is entry i + 1. What led on
from the last frame is known only if there is one entry more than frames; else the last frame is left out.

With one entry more than frames the description can be read otherwise: entry 0 is that of no frame, entry 1 that of
frame 0. If an entry led to its frame then, action i is entry i + 2. Only the pictures can tell: the doctor's test for
shifted inputs does, and `game.inputs.first_entry` (1) is the entry that leads on from frame 0.

The json can contradict: where entries have `yaw`, it must change towards entry i by 15 x yaw_delta of entry i, and a
file where it goes by that of a neighbour is refused. Keys have the names of those that Minecraft binds: w, s, a, d,
space, left_shift, left_control. Minecraft's pitch grows downwards, here it grows upwards; its yaw grows to the right.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from configs import storage
from configs.errors import UserError
from configs.game import GameConfig
from configs.untrusted import parse_object
from data_pipeline.readers.keys import bind_keys, mouse_rows
from data_pipeline.readers.logs import Row, read_text
from data_pipeline.readers.recording import Format, cut_episodes, find_pairs, open_video, read_pair, say
from data_pipeline.types import Actions, Episode

DEG_PER_DELTA = 15.0
CHOICES = {"ws": ("", "w", "s"), "ad": ("", "a", "d"), "scs": ("", "space", "left_shift", "left_control")}
KEYS = [name for names in CHOICES.values() for name in names if name]
SAME_DEG = 0.5  # a yaw that changes by this much more or less than its delta agrees with it


def find_recordings(source: str | Path) -> dict[str, list[Path]]:
    """The pairs of `metadata/` and `video/` (or `videos/`) in `source`, by name."""
    folders = [storage.path(source) / name for name in ("video", "videos", "metadata")]
    return find_pairs(*(folder for folder in folders if folder.is_dir()), log=".json")


def read_recording(name: str, video: Path, log: Path, game: GameConfig) -> list[Episode]:
    """The one episode of a pair."""
    keys = bind_keys(game, KEYS)
    footage, entries = open_video(video, game), read_entries(log)
    if len(entries) - footage.frames not in (0, 1):
        raise UserError(f"{log} has {len(entries)} entries, {video} has {footage.frames} frames; as many or one more")
    first = game.inputs.first_entry
    if len(entries) > footage.frames:
        taken = f"entry {first} is taken to lead on from frame 0"
        say(f"one entry more than frames: {taken}; let the doctor find out, and set game.inputs.first_entry")
    keyboard = np.stack([keys.row(_held(entry), entry.where) for entry in entries[first:]])
    degrees = np.zeros((len(entries), 2))
    if game.action_space.mouse:
        deltas = [[-entry.number("pitch_delta"), entry.number("yaw_delta")] for entry in entries[first:]]
        degrees[first:] = DEG_PER_DELTA * np.array(deltas)
        check_poses(log, entries, degrees[:, 1])
    mouse = mouse_rows(game.action_space, degrees, lambda i: entries[i].where)
    return cut_episodes(name, footage, Actions(keyboard, mouse[first:])[: footage.frames])


FORMAT = Format(find_recordings, partial(read_pair, read_recording))


def read_entries(log: Path) -> list[Row]:
    """The entries 0, 1, 2, ... of `actions`."""
    entries = parse_object(read_text(log), log).get("actions")
    entries = entries if isinstance(entries, dict) else {}
    names = [str(i) for i in range(len(entries))]
    if len(names) < 4 or not all(isinstance(entries.get(name), dict) for name in names):
        raise UserError(f"{log} must hold actions, an object of objects 0, 1, 2, 3, ... of which none is left out")
    return [Row(f"{log} entry {name}", entries[name]) for name in names]


def _held(entry: Row) -> Iterator[str]:
    for axis, choices in CHOICES.items():
        value = entry.number(axis)
        if value not in range(len(choices)):
            raise UserError(f"{entry.where}: {axis} must be 0 to {len(choices) - 1}, not {value:g}")
        if value:
            yield choices[int(value)]


def check_poses(log: Path, entries: Sequence[Row], yaw_deg: np.ndarray) -> None:
    """A UserError if the `yaw` of `entries` changes by the `yaw_deg` (n) of the entries before or after them."""
    if any("yaw" not in entry.cells for entry in entries):
        return
    turned = np.diff([entry.number("yaw") for entry in entries], prepend=0.0)
    turned[[0, 1, -1]] = 0.0  # what has no neighbour, and entry 0
    turns = np.flatnonzero(np.abs(turned) > SAME_DEG)
    if not len(turns):
        return
    off = {shift: (turned[turns] - yaw_deg[turns + shift] + 180) % 360 - 180 for shift in (0, -1, 1)}
    agreeing = {shift: np.mean(np.abs(degrees) < SAME_DEG) for shift, degrees in off.items()}
    best = max(off, key=agreeing.__getitem__)
    if agreeing[best] > 0.9 and agreeing[best] - agreeing[0] > 0.05:
        share, side = f"{agreeing[best]:.0%} of the turns", "before" if best < 0 else "after"
        raise UserError(f"{log}: the actions are shifted: yaw changes by the yaw_delta of the entry {side} in {share}")
