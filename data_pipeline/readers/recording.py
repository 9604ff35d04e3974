"""What the formats share: how recordings and their files are found, and how a recording is cut into episodes."""

import importlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.game import GameConfig
from data_pipeline.types import Actions, Episode, Footage
from data_pipeline.video import frame_times, probe, read_frames

RATE_TOLERANCE = 0.005  # relative; 29.97 is 30, 24 is not 25
MOST_OFF = 0.25  # frames by which one may be shown early or late, as if all came evenly
VIDEOS = (
    ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".flv", ".f4v", ".mpg", ".mpeg",
    ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".ogm", ".mxf", ".nut", ".dv", ".rm", ".rmvb",
    ".y4m", ".h264", ".264", ".hevc", ".h265", ".265", ".ivf", ".obu",
)  # fmt: skip
MOST_NAMES, MOST_LETTERS = 5, 200  # names in one line, letters of each
# What a recording that is damaged or incomplete raises. A disk or a server that refuses to give it is another matter.
BAD_RECORDING = (ValueError, FileNotFoundError)


class UnevenTimesError(UserError):
    """A video whose frames do not come evenly, so that it is unknown which row of a log belongs to which frame."""


class Recording(NamedTuple):
    """One recording of a source; held-out recordings are chosen whole, since its episodes resemble each other."""

    name: str
    read: Callable[[GameConfig], Sequence[Episode]]  # reads its actions; frames only when asked for
    session: str | None = None  # recordings of one session are parts of one play, and held out together


class Format(NamedTuple):
    """What the module of a recording format declares, as its FORMAT."""

    find: Callable[[str | Path], list[Recording]]  # the recordings in a source, by name; little is read of them yet
    scaled_mouse: bool = False  # its mouse counts in units whose degrees only the game's YAML says


ReadPair = Callable[[str, Path, Path, GameConfig], Sequence[Episode]]  # name, video and log


@cache
def say(line: str) -> None:
    """Prints a line about recordings on stderr; the same line only once."""
    tqdm.write(line, file=sys.stderr)


def open_video(video: Path, game: GameConfig) -> Footage:
    """The pictures of a video that are paired with rows by their number.

    Raises UserError for another rate than the game's and for uneven times.
    """
    footage = probe_footage(video)
    check_times(video, frame_times(video), game)
    return footage


def probe_footage(video: Path) -> Footage:
    info = probe(video)
    read = partial(read_frames, video)
    return Footage(video, info.frames, info.height, info.width, read, changes=info.changes)


def check_rate(video: Path, fps: float, game: GameConfig) -> None:
    """Raises UserError for another rate than the game's, unless frames are taken by their times."""
    if game.inputs.times == "even" and abs(fps / game.fps - 1) > RATE_TOLERANCE:
        fix = "set game.fps, or game.inputs.fps to leave frames out"
        raise UserError(f"{video} runs at {fps:g} fps, the game {game.name!r} at {game.fps:g}; {fix}")


def check_times(video: Path, times: np.ndarray, game: GameConfig) -> None:
    """Raises UserError unless frames that are shown at `times` (n) come evenly and at the game's rate, or are taken by
    their times. The rate in a header is not used: it counts how long the last frame stays."""
    if game.inputs.times != "even" or len(times) < 2:
        return
    frames, lasts = np.arange(len(times)), float(np.ptp(times))
    if not lasts:
        check_rate(video, 0.0, game)
    off = (times - times[0]) * (frames[-1] / lasts) - frames
    wrong = np.flatnonzero(np.abs(off) > MOST_OFF)
    if len(wrong):
        frame = wrong[0]
        how = f"{abs(off[frame]):.2f} frames {'late' if off[frame] > 0 else 'early'} at {times[frame]:.3f} s"
        fix = "record at a constant rate or set game.inputs.times=resample"
        raise UnevenTimesError(f"{video}: frame {frame} is shown {how}, its rate varies; {fix}")
    if abs(lasts * game.fps - frames[-1]) > MOST_OFF + RATE_TOLERANCE * frames[-1]:
        check_rate(video, frames[-1] / lasts, game)


def cut_episodes(
    name: str, footage: Footage, actions: Actions, spans: Sequence[tuple[int, int]] | None = None
) -> list[Episode]:
    """One episode per span of frames (first, one past the last); without `spans` one of all that have an action.

    Where a recording was cut, an episode is called `<name>-f<its first frame, six digits>`.
    """
    spans = [(0, len(actions))] if spans is None else spans
    whole = len(spans) == 1 and spans[0][0] == 0
    return [
        Episode(name if whole else f"{name}-f{first:06d}", actions[first:stop], footage, first, stop)
        for first, stop in spans
    ]


def recording_of(episode: str) -> str:
    """The name of the recording that the episode with this id was cut from."""
    return re.sub(r"-f\d{6,}$", "", episode)


def find_spans(keep: np.ndarray, jumps: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last index of each run of frames to `keep` (n) bool.

    Where `jumps` (n) bool is true, a frame does not follow the one before it, and another run begins.
    """
    begins = keep & (~np.roll(keep, 1) | jumps)
    ends = keep & (~np.roll(keep, -1) | np.roll(jumps, -1))
    begins[:1], ends[-1:] = keep[:1], keep[-1:]
    return list(zip(np.flatnonzero(begins).tolist(), (np.flatnonzero(ends) + 1).tolist(), strict=True))


def find_pairs(videos: Path, logs: Path, suffixes: tuple[str, ...], read: ReadPair) -> list[Recording]:
    """Each video in `videos` with the log of its name in `logs`, by name; one without the other cannot be read."""
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in [*list_files(videos, *VIDEOS), *list_files(logs, *suffixes)]:
        by_name[path.stem].append(path)
    if not by_name:
        raise UserError(f"{videos} holds no videos with a {' or '.join(suffixes)} each")
    return [Recording(name, partial(read_pair, name, files, read)) for name, files in sorted(by_name.items())]


def find_pairs_or_folders(source: str | Path, suffixes: tuple[str, ...], read: ReadPair) -> list[Recording]:
    """The videos in `source` with the log of their name; or the folders in it, or itself, with one of each."""
    source = storage.path(source)
    files = list_files(source, *VIDEOS, *suffixes)
    if not any(path.name.lower().endswith(VIDEOS) for path in files):
        files = []  # a table beside folders may list them
    if len(files) > 2 or len({path.stem for path in files}) == 1:
        return find_pairs(source, source, suffixes, read)
    what = f"a video and a {' or '.join(suffixes)}"
    folders = [source] if files else find_folders(source, what, lambda one: bool(list_files(one, *VIDEOS, *suffixes)))
    held = {folder.name: list_files(folder, *VIDEOS, *suffixes) for folder in folders}
    return [Recording(name, partial(read_pair, name, held[name], read)) for name in held]


def read_pair(name: str, files: Sequence[Path], read: ReadPair, game: GameConfig) -> Sequence[Episode]:
    """The episodes of a recording that must be one video and one log."""
    videos = [path for path in files if path.name.lower().endswith(VIDEOS)]
    logs = [path for path in files if path not in videos]
    if len(videos) != 1 or len(logs) != 1:
        names = list_names([path.name for path in files])
        raise UserError(f"{files[0]}: a recording needs one video and one log, there is {names}")
    return read(name, videos[0], logs[0], game)


def find_folders(source: str | Path, what: str, holds: Callable[[Path], bool], log: str = "") -> list[Path]:
    """The folders directly in `source` that hold `what`, by name; what else lies there is named on stderr.

    With the name of a `log`, also those that have just that file; or `source` alone, if it has one.
    """
    listed = _list_all(source)
    if log and (storage.path(source) / log).is_file():
        return [storage.path(source)]
    folders = [path for path in listed if not path.name.startswith(".") and path.is_dir()]
    found = [path for path in folders if (log and (path / log).is_file()) or holds(path)]
    if not found:
        raise UserError(f"{source} holds no folders with {what}")
    others = [path.name for path in listed if path not in found and path.name != ".lock"]  # `record` makes it
    if others and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{source}: left out, as they are no folders with {what}: {list_names(others)}")
    return found


def list_names(names: Sequence[str]) -> str:
    """The first few names, in one line."""
    cut = [name[:MOST_LETTERS] for name in names[:MOST_NAMES]]
    shown = ", ".join(name if name and name.isprintable() else repr(name) for name in cut)
    return shown + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def list_folders(source: str | Path) -> list[Path]:
    """The folders directly in `source`, by name. Names that begin with a dot are unfinished ones or the system's."""
    return [path for path in _list_all(source) if not path.name.startswith(".") and path.is_dir()]


def list_files(source: str | Path, *suffixes: str) -> list[Path]:
    """The files directly in `source` whose names end in one of `suffixes`, by name; none that begin with a dot."""
    named = [path for path in _list_all(source) if path.name.lower().endswith(suffixes)]
    return [path for path in named if not path.name.startswith(".") and path.is_file()]


def _list_all(source: str | Path) -> list[Path]:
    source = storage.path(source)
    if not source.is_dir():
        raise MissingFileError(f"no folder of recordings {source}")
    return sorted(source.iterdir())


def import_extra(module: str) -> Any:
    """An optional package; raises UserError with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"these recordings need {package}: pip install 'worldloom[readers]'") from error
