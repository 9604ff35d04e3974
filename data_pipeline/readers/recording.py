"""What readers share: a recording, an episode that is a span of a video's frames, how files are found and read."""

import csv
import importlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.foreign import parse_object
from configs.game import ActionSpace, GameConfig
from data_pipeline.types import Actions, Episode
from data_pipeline.video import VideoInfo, frame_times, probe, read_frames

RATE_TOLERANCE = 0.005  # relative; 29.97 is 30, 24 is not 25
OFF = 0.25  # frames by which one may be shown early or late, as if all came evenly
VIDEOS = (
    ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".flv", ".f4v", ".mpg", ".mpeg",
    ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".ogm", ".mxf", ".nut", ".dv", ".rm", ".rmvb",
    ".y4m", ".h264", ".264", ".hevc", ".h265", ".265", ".ivf", ".obu",
)  # fmt: skip
LARGEST = float(np.finfo(np.float32).max)  # of a number: rows of actions are float32
TEXT_BYTES = 1 << 29  # of a log; a larger one is none
NAMED, NAME = 5, 200  # names that one line lists, letters of each
# What a recording that is damaged, or not whole, raises. A disk or a server that refuses to give it is another matter.
BAD_RECORDING = (ValueError, FileNotFoundError)


class UnevenTimesError(UserError):
    """A video whose frames do not come evenly, so that nobody knows which row of a log is which frame's."""


class Recording(NamedTuple):
    """One recording of a source; held-out recordings are chosen whole, since its episodes resemble each other."""

    name: str
    read: Callable[[GameConfig], Sequence[Episode]]  # its actions are read, its frames only when asked for
    session: str | None = None  # recordings of one session are parts of one play, and held out together


@cache
def say(line: str) -> None:
    """Says something about recordings on stderr; the same line just once."""
    tqdm.write(line, file=sys.stderr)


def say_left_out(source: str | Path, folders: Sequence[Path], why: str) -> None:
    """Says which folders are no recordings, if any."""
    if folders:
        say(f"{source}: left out {list_names([one.name for one in folders])}: {why}")


@dataclass(frozen=True)
class VideoEpisode:
    """Frames `first` to `first` + n of a video with their n actions; frames are decoded when asked for."""

    id: str
    video: Path
    first: int
    fps: float
    height: int  # px, as recorded
    width: int  # px
    action_space: ActionSpace
    actions: Actions
    recorded: int | None = None  # frames of the whole recording, where it was cut

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, (h w 3) uint8 RGB, as recorded."""
        return read_frames(self.video, self.first, self.first + len(self.actions))


def probe_video(video: Path, game: GameConfig) -> VideoInfo:
    """What the video says about itself. Raises ValueError for another rate than the game's and for uneven times."""
    info = probe(video)
    check_times(video, frame_times(video), game)
    return info


def check_rate(video: Path, fps: float, game: GameConfig) -> None:
    """Raises ValueError for another rate than the game's; of frames that are taken by their times any is right."""
    if game.inputs.times == "even" and abs(fps / game.fps - 1) > RATE_TOLERANCE:
        raise UserError(
            f"{video} runs at {fps:g} fps, the game {game.name!r} at {game.fps:g}; set game.fps, or game.inputs.fps to "
            "leave frames out"
        )


def check_times(video: Path, times: np.ndarray, game: GameConfig) -> None:
    """Raises ValueError unless frames of the video that are shown at `times` (n) come evenly and at the game's rate, or
    are to be taken by their times. What a header says of the rate counts how long the last frame stays."""
    if game.inputs.times != "even" or len(times) < 2:
        return
    frames, lasts = np.arange(len(times)), float(np.ptp(times))
    if not lasts:
        check_rate(video, 0.0, game)
    off = (times - times[0]) * (frames[-1] / lasts) - frames
    wrong = np.flatnonzero(np.abs(off) > OFF)
    if len(wrong):
        frame = wrong[0]
        how = f"{abs(off[frame]):.2f} frames {'late' if off[frame] > 0 else 'early'}"
        raise UnevenTimesError(
            f"{video}: frame {frame} is shown {how} at {times[frame]:.3f} s, its rate varies; record at a constant "
            "rate, or set game.inputs.times=resample to take frames by their times"
        )
    if abs(lasts * game.fps - frames[-1]) > OFF + RATE_TOLERANCE * frames[-1]:
        check_rate(video, frames[-1] / lasts, game)


def cut_video(
    name: str, video: Path, info: VideoInfo, game: GameConfig, actions: Actions, spans: Sequence[tuple[int, int]]
) -> list[VideoEpisode]:
    """One episode per span of frames: first, one past the last. `actions` has a row for each frame up to the last span.

    Where a recording was cut, an episode is called `<name>-f<its first frame, six digits>`.
    """
    episodes = []
    for first, end in spans:
        part, size = name_part(name, first, spans), (info.height, info.width)
        rows = actions[first:end]
        episodes.append(VideoEpisode(part, video, first, game.fps, *size, game.action_space, rows, info.frames))
    return episodes


def name_part(name: str, first: int, spans: Sequence[tuple[int, int]]) -> str:
    """The id of the episode of the recording `name` that begins with frame `first`, of `spans` that it was cut into."""
    return name if len(spans) == 1 and first == 0 else f"{name}-f{first:06d}"


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


def find_pairs(
    videos: Path, logs: Path, suffixes: tuple[str, ...], read: Callable[[Path, Path, GameConfig], Sequence[Episode]]
) -> list[Recording]:
    """Each video in `videos` with the log of its name in `logs`, to be read by `read`, in the order of their names.

    One without the other is a recording that cannot be read; where there are no others, this raises ValueError.
    """
    suffix, found = " or ".join(suffixes), [{}, {}]
    for by_name, folder, kinds in ((found[0], videos, VIDEOS), (found[1], logs, suffixes)):
        for path in list_files(folder, *kinds):
            if by_name.setdefault(path.stem, path) != path:
                raise UserError(f"{by_name[path.stem]} and {path} have the same name; rename or delete one")
    pairs = found[0].keys() & found[1].keys()
    if not pairs:
        for path in [*found[0].values(), *found[1].values()]:
            _refuse_alone(path, suffix)
        raise UserError(f"{videos} holds no .mp4 with a {suffix} each")
    return [
        Recording(name, partial(read, found[0][name], found[1][name]))
        if name in pairs
        else Recording(name, partial(_refuse_alone, found[0].get(name) or found[1][name], suffix))
        for name in sorted(found[0].keys() | found[1].keys())
    ]


def _refuse_alone(path: Path, suffix: str, game: GameConfig | None = None) -> Sequence[Episode]:
    raise UserError(f"{path} stands alone; every <name>.mp4 needs a <name>{suffix}, and the other way round")


def check_rows(log: Path, rows: int, video: Path, info: VideoInfo) -> None:
    """Raises ValueError if a log has not one row per frame: then nobody knows which row belongs to which frame."""
    if rows != info.frames:
        raise UserError(f"{log} has {rows} rows, {video} has {info.frames} frames; there must be one row per frame")


def find_folders(source: str | Path, holds: Callable[[Path], bool]) -> list[Path]:
    """The folders directly in `source` that hold a recording, by name. What else lies there is left out, and one line
    on stderr says what; names that begin with a dot are unfinished ones or the system's."""
    listed = _list_all(source)
    found = [path for path in listed if not path.name.startswith(".") and path.is_dir() and holds(path)]
    names = {path.name for path in found}
    others = [path.name for path in listed if path.name not in names and path.name != ".lock"]  # of `record`
    if others and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{source}: left out, being no recordings: {list_names(others)}")
    return found


def list_names(names: Sequence[str]) -> str:
    """The first few names, in one line."""
    shown = [name if name and name.isprintable() else repr(name) for name in (name[:NAME] for name in names[:NAMED])]
    return ", ".join(shown) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def list_folders(source: str | Path) -> list[Path]:
    """The folders directly in `source`, by name. Names that begin with a dot are unfinished ones."""
    return [path for path in _list(source) if path.is_dir()]


def list_files(source: str | Path, *suffixes: str) -> list[Path]:
    """The files directly in `source` whose names end in one of `suffixes`, by name."""
    return [path for path in _list(source) if path.name.lower().endswith(suffixes) and path.is_file()]


def _list(source: str | Path) -> list[Path]:
    return [path for path in _list_all(source) if not path.name.startswith(".")]


def _list_all(source: str | Path) -> list[Path]:
    source = storage.path(source)
    if not source.is_dir():
        raise MissingFileError(f"no folder of recordings {source}")
    return sorted(source.iterdir())


def require_text_name(where: str) -> None:
    """Raises ValueError for a name that is no text: neither JSON nor a shard could hold it."""
    try:
        where.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where!r} is no name in UTF-8; rename it, or set LC_ALL=C.UTF-8 if it looks right") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return parse_object(read_text(path), path)


def read_text(path: Path) -> str:
    """A file's text."""
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    if storage.size(path) > TEXT_BYTES:
        raise UserError(f"{path} has {storage.size(path)} bytes; a log of a recording has at most {TEXT_BYTES}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: {error}") from error


def read_csv(path: Path, frames: int | None = None) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the rows of a table, each row with its line's number in the file; empty lines are left out.

    With `frames`, those of its video, a table that has more rows is refused before they take memory.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        numbered = ((reader.line_num, row) for row in reader if row)
        rows = list(islice(numbered, frames))
        more = sum(1 for _ in numbered)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from error
    if more:
        raise UserError(
            f"{path} has {len(rows) + more} rows, its video has {frames} frames; there must be one row per frame"
        )
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path} line {line}: {len(row)} cells, the header has {len(header)}")
    return header, rows


def read_number(value: Any, where: str) -> float:
    """A number that float32 can hold, given as one or as its text; `where` names it in errors."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST or isinstance(value, bool):
        limit = f" up to {LARGEST:.2g}" if abs(number) > LARGEST else ""
        raise UserError(f"{where} is {value!r:.80}, which is no number{limit}")
    return number


def import_extra(module: str, what: str) -> Any:
    """An optional package; raises ValueError with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} need {module.partition('.')[0]}: pip install 'worldloom[readers]'") from error
