"""What the formats share: how recordings and their files are found, and how a recording is cut into episodes."""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from configs import storage
from configs.errors import FileError, MissingFileError, UserError, one_line
from configs.game import GameConfig
from configs.untrusted import reading
from data_pipeline.types import Actions, Episode, Footage
from data_pipeline.video import frame_times, probe

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


class Recording(NamedTuple):
    """One recording of a source; held-out recordings are chosen whole, since its episodes resemble each other."""

    name: str
    read: Callable[[GameConfig], Sequence[Episode]]  # reads its actions; frames only when asked for
    session: str  # recordings of one session are parts of one play, and held out together


class Format(NamedTuple):
    """What the module of a recording format declares, as its FORMAT."""

    find: Callable[[str | Path], Mapping[str, Any]]  # the recordings in a source by name: what `read` needs of each
    read: Callable[[str, Any, GameConfig], Sequence[Episode]]  # from a recording's name and what was found
    session: re.Pattern[str] | None = None  # its group in a recording's name is the session's name


ReadPair = Callable[[str, Path, Path, GameConfig], Sequence[Episode]]  # name, video and log


@cache
def say(line: str) -> None:
    """Prints a line about recordings on stderr; the same line only once."""
    tqdm.write(line, file=sys.stderr)


def open_video(video: Path, game: GameConfig) -> Footage:
    """The pictures of a video that are paired with rows by their number. Its times are checked as by `check_times`."""
    footage = probe(video)
    check_times(video, frame_times(video), game)
    return footage


def check_times(video: Path, times: np.ndarray, game: GameConfig) -> None:
    """A UserError unless frames shown at `times` (n) are even and at the game's rate, or are taken by their times."""
    step_s = float(np.ptp(times)) / max(len(times) - 1, 1) or 1.0
    off = (times - np.linspace(times[0], times[-1], len(times))) / step_s
    if game.inputs.times == "even" and (np.abs(off) > MOST_OFF).any():
        frame = int(np.argmax(np.abs(off) > MOST_OFF))
        how = f"{abs(off[frame]):.2f} frames {'late' if off[frame] > 0 else 'early'} at {times[frame]:.3f} s"
        fix = "record at a constant rate or set game.inputs.times=resample"
        raise UserError(f"{video}: frame {frame} is shown {how}, its rate varies; {fix}")
    check_rate(video, times, game, MOST_OFF)


def check_rate(video: Path, times: np.ndarray, game: GameConfig, most_off: float = 1.0) -> None:
    """A UserError for another rate than the game's, unless frames are taken by their times. Some may be left out.

    The last frame may be `most_off` frames early or late. The rate in a header is not used: it counts how long the last
    frame stays.
    """
    steps, frames = np.diff(times), len(times) - 1
    if game.inputs.times != "even" or abs(steps.sum() * game.fps - frames) <= most_off + RATE_TOLERANCE * frames:
        return
    usual = np.median(steps)  # and of those like it the mean, since Matroska rounds 16.67 to 16 or 17 ms
    step_s = float(steps[np.abs(steps - usual) <= usual / 2].mean())
    fps = 1 / step_s if step_s else 0.0
    if abs(fps / game.fps - 1) > RATE_TOLERANCE:
        fix = "set game.fps, or game.inputs.fps to leave frames out"
        raise UserError(f"{video} runs at {fps:g} fps, the game {game.name!r} at {game.fps:g}; {fix}")


def cut_episodes(
    name: str, footage: Footage, actions: Actions, keep: np.ndarray | None = None, jumps: np.ndarray | None = None
) -> list[Episode]:
    """One episode per run of frames to `keep` (n) bool, by default of all that have an action.

    Where `jumps` (n) bool is true, a frame does not follow the one before it, and another run begins. Where a recording
    was cut, an episode is called `<name>-f<its first frame, six digits>`.
    """
    keep = np.ones(len(actions), dtype=bool) if keep is None else keep
    cuts = keep[1:] != keep[:-1] if jumps is None else (keep[1:] != keep[:-1]) | jumps[1:]
    runs = np.split(np.arange(len(keep)), np.flatnonzero(cuts) + 1)
    spans = [(int(run[0]), int(run[-1]) + 1) for run in runs if keep[run].any()]
    whole = len(spans) == 1 and spans[0][0] == 0
    return [
        Episode(name if whole else f"{name}-f{first:06d}", actions[first:stop], footage, first, stop)
        for first, stop in spans
    ]


def recording_of(episode: str) -> str:
    """The name of the recording that the episode with this id was cut from."""
    return re.sub(r"-f\d{6,}$", "", episode)


def find_pairs(*folders: str | Path, log: str) -> dict[str, list[Path]]:
    """The videos and the files with the ending `log` in `folders`, by their names without suffix, for `read_pair`."""
    return _by_stem(file for folder in folders for file in list_files(folder, *VIDEOS, log))


def _by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_stem[path.stem].append(path)
    return by_stem


def find_pairs_or_folders(source: str | Path, logs: Sequence[str]) -> dict[str, list[Path]]:
    """The videos and `logs` in `source` by name; or those of each folder in it, or of itself, if it has one of each."""
    endings = (*VIDEOS, *logs)
    files = list_files(source, *endings)
    if len({is_video(path) for path in files}) < 2:  # a table beside folders may list them
        what = f"a video and a {' or '.join(logs).replace('/', '')}"
        folders = find_folders(source, what, lambda folder: list_files(folder, *endings))
        return {name: list_files(folder, *endings) for name, folder in folders.items()}
    if len(files) == 2 and files[0].stem != files[1].stem:
        return {storage.path(source).name: files}
    return _by_stem(files)


def is_video(path: Path) -> bool:
    return path.name.lower().endswith(VIDEOS)


def read_pair(read: ReadPair, name: str, files: Sequence[Path], game: GameConfig) -> Sequence[Episode]:
    """The episodes of a recording that must be one video and one log."""
    if sorted(map(is_video, files)) != [False, True]:
        names = list_names([path.name for path in files])
        raise UserError(f"{files[0]}: a recording needs one video and one log, there is {names}")
    log, video = sorted(files, key=is_video)
    return read(name, video, log, game)


def find_folders(source: str | Path, what: str, holds: Callable[[Path], Any]) -> dict[str, Path]:
    """The folders directly in `source` that hold `what`, by name; what else lies there is named on stderr."""
    listed = _list_all(source)
    folders = {path.name: path for path in listed if not path.name.startswith(".") and path.is_dir() and holds(path)}
    others = [path.name for path in listed if path.name not in {*folders, ".lock"}]  # `record` makes .lock
    if folders and others and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{source}: left out, as they are no folders with {what}: {list_names(others)}")
    return folders


def list_names(names: Sequence[str]) -> str:
    """The first few names, in one line."""
    cut = [name[:MOST_LETTERS] for name in names[:MOST_NAMES]]
    shown = ", ".join(name if name and name.isprintable() else repr(name) for name in cut)
    return shown + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def list_files(source: str | Path, *endings: str, depth: int = 0) -> list[Path]:
    """The files in `source`, and in its folders `depth` deep, whose `/name` in lower case has one of `endings`.

    Names that begin with a dot are unfinished ones or the system's.
    """
    paths = [path for path in _list_all(source) if not path.name.startswith(".")]
    files = [path for path in paths if f"/{path.name.lower()}".endswith(endings) and path.is_file()]
    folders = [path for path in paths if path.is_dir()] if depth else []
    return files + [file for folder in folders for file in list_files(folder, *endings, depth=depth - 1)]


def _list_all(source: str | Path) -> list[Path]:
    source = storage.path(source)
    if not source.is_dir():
        raise MissingFileError(f"no folder of recordings {source}")
    return sorted(source.iterdir())


@contextmanager
def reading_with(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """As `reading`, with a package that raises `errors` for damaged files of its `kind`."""
    with reading(path):
        try:
            yield
        except FileError:  # a server that refuses, not a damaged file
            raise
        except errors as error:
            raise UserError(f"cannot read {path} ({one_line(error)[:200]}); it is truncated or no {kind}") from error
