"""LeRobot's dataset format v3: `meta/`, `data/` and `videos/`; many episodes share a parquet file and an mp4.

`meta/info.json` names features and paths, `meta/episodes/` says where each episode's rows and pictures lie. Row i of an
episode (`frame_index` i) holds the `action` that was sent on seeing frame i (LeRobot's recording loop takes the
observation, then the action), so it is action i and leads to frame i + 1. Its picture is the one at `from_timestamp` +
`timestamp` of row i in the episode's video (`_query_videos`), and is looked for at that time among the times that the
video itself gives, within a quarter of a frame.

`action` (in some datasets `actions`) is a vector of named components (`names` in info.json; their numbers where there
are none). `game.inputs.keys` binds keys to components, which must then be 0 or 1; `game.inputs.axes` names the
components that are the mouse's y and x, and `pitch_deg` and `yaw_deg` say how many degrees up and right one unit is.

Of the patterns of paths in info.json only the numbers and the video's name are filled in, and what they give lies in
the dataset. Datasets of version 2 and those with pictures in the parquet files are refused with LeRobot's converter.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import compute, parquet

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.game import GameConfig
from configs.untrusted import inside, reading
from data_pipeline.readers.keys import bind_keys, scale_mouse
from data_pipeline.readers.logs import Row, check_frame_numbers, read_facts, read_number
from data_pipeline.readers.recording import Format, check_times, list_files, reading_with
from data_pipeline.types import Actions, Episode
from data_pipeline.video import frame_times, probe

INFO, EPISODES, ACTIONS, EPISODE = "meta/info.json", "meta/episodes", ("action", "actions"), "episode_index"
COMPONENTS = 10_000  # more than any vector of keys and axes has
# What a pattern of info.json may ask for; str.format would give it attributes and widths of any size.
FIELD = re.compile(r"\{(?:(chunk_index|file_index)(?::0(\d)d)?|(video_key))\}")
CONVERT = "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=NAME --push-to-hub=false --root="
CONVERT_IMAGES = "lerobot-edit-dataset --repo_id NAME --root FOLDER --operation.type convert_image_to_video"


@dataclass(frozen=True)
class Info:
    """What is used of `meta/info.json`."""

    codebase_version: str
    features: dict[str, dict[str, Any]]
    data_path: str
    video_path: str | None = None


class Dataset(NamedTuple):
    """A folder in this format."""

    root: Path
    info: Info
    action: str  # the feature that is the action
    components: list[str]  # names of the action vector's


def find_episodes(source: str | Path) -> dict[str, tuple[Dataset, Row]]:
    """The dataset `source`, and what the parquet files in `meta/episodes` say of each episode."""
    dataset = read_info(storage.path(source))
    episodes: dict[str, tuple[Dataset, Row]] = {}
    for file in list_files(dataset.root / EPISODES, ".parquet", depth=1):
        for row in read_parquet(file, (EPISODE, "length", "data/", "videos/")):
            name = f"episode_{row.count(EPISODE):06d}"
            if name in episodes:
                raise UserError(f"{row.where} lists the {EPISODE} {row.count(EPISODE)} a second time")
            episodes[name] = dataset, row
    return episodes


def read_info(root: Path) -> Dataset:
    path = root / INFO
    info = read_facts(Info, path)
    if not info.codebase_version.startswith("v3."):
        raise UserError(f"{path} is of version {info.codebase_version:.20}; convert it, in place: {CONVERT}{root}")
    action = next((name for name in ACTIONS if name in info.features), None)
    if action is None:
        raise UserError(f"{path} has no feature {' or '.join(ACTIONS)}, but {', '.join(info.features):.300}")
    names, shape = (info.features[action].get(part) for part in ("names", "shape"))
    if not isinstance(shape, list) or [type(part) for part in shape] != [int] or not 0 < shape[0] < COMPONENTS:
        raise UserError(f"{path}: the feature {action} must be a vector, not of shape {shape!r:.80}")
    with reading(path):
        if isinstance(names, dict):  # {"motors": [...]} or {"w": 0, "a": 1, ...}
            groups = [group for group in names.values() if isinstance(group, list)]
            names = groups[0] if groups else sorted(names, key=names.__getitem__)
        names = [str(name) for name in names or range(shape[0])]
    if len(names) != shape[0] or len(set(names)) != len(names):
        raise UserError(f"{path}: {action} has {shape[0]} components and the names {', '.join(names):.200}")
    return Dataset(root, info, action, names)


def choose_camera(dataset: Dataset, wanted: str | None) -> str:
    """The feature that is the picture."""
    kinds = {name: feature.get("dtype") for name, feature in dataset.info.features.items()}
    videos, pictures = ([name for name, kind in kinds.items() if kind == dtype] for dtype in ("video", "image"))
    camera = wanted or (videos or pictures or [""])[0]
    if camera in pictures:
        raise UserError(f"{dataset.root / INFO}: {camera} has its pictures in the tables: {CONVERT_IMAGES}")
    if camera not in videos or (wanted is None and len(videos) > 1):
        there = ", ".join(videos) or "none"
        raise UserError(f"{dataset.root / INFO}: choose a video by game.inputs.camera; there are: {there}")
    return camera


def read_episode(name: str, files: tuple[Dataset, Row], game: GameConfig) -> list[Episode]:
    """The one episode that a row of `meta/episodes` describes."""
    dataset, about = files
    camera, index = choose_camera(dataset, game.inputs.camera), about.count(EPISODE)
    table = fill_pattern(dataset, dataset.info.data_path, about, "data/")
    video = fill_pattern(dataset, dataset.info.video_path or "", about, f"videos/{camera}/", camera)
    rows = read_parquet(table, (dataset.action, "timestamp", "frame_index"), index)
    if len(rows) != about.count("length"):
        raise UserError(f"{table}: episode {index} has {len(rows)} rows, {EPISODES} says {about.count('length')}")
    if not rows:
        return []
    check_frame_numbers(rows, "frame_index", first=0)
    actions = read_actions(rows, dataset, game)
    begin = about.number(f"videos/{camera}/from_timestamp")
    shown = np.array([begin + row.number("timestamp") for row in rows])
    footage = replace(probe(video), frames=len(rows))
    first = find_first(video, shown, game.fps)
    check_times(video, frame_times(video)[first : first + len(rows)], game)  # episodes may lie apart in it
    return [Episode(name, actions, footage, first, first + len(rows))]


FORMAT = Format(find_episodes, read_episode)


def read_actions(rows: Sequence[Row], dataset: Dataset, game: GameConfig) -> Actions:
    """The action vectors as the game's actions."""
    axes, components = game.inputs.axes if game.action_space.mouse else (), dataset.components
    if len(axes) != 2 * game.action_space.mouse or not set(axes) <= set(components):
        there = ", ".join(components)
        raise UserError(f"game.inputs.axes must name the mouse's y and x of {there}, or set action_space.mouse=false")
    names = [name for name in components if name not in axes]
    keys = bind_keys(game, names)
    table = np.array([_vector(row, dataset.action, len(components)) for row in rows], dtype=np.float64)
    held, moves = (table[:, [components.index(name) for name in part]] for part in (names, axes))
    moves = moves if axes else np.zeros((len(rows), 2))
    return Actions(keys.rows(names, held, lambda i: rows[i].where), scale_mouse(game, moves, lambda i: rows[i].where))


def _vector(row: Row, column: str, length: int) -> list[float]:
    vector = row.cell(column)
    if not isinstance(vector, list) or len(vector) != length:
        raise UserError(f"{row.where}: the {column} is {vector!r:.80}, not {length} numbers")
    return [read_number(part, f"{row.where}: the {column}") for part in vector]


def find_first(video: Path, shown: np.ndarray, fps: float) -> int:
    """The number of the frame at `shown[0]`, given when an episode's frames are shown, (n) seconds.

    A UserError if one of them is not in the video at its time, within a quarter of a frame.
    """
    times = frame_times(video)
    first = int(np.argmin(np.abs(times - shown[0])))
    part = times[first : first + len(shown)]
    wrong = np.flatnonzero(~(np.abs(part - shown[: len(part)]) < 0.25 / fps))
    i = int(wrong[0]) if len(wrong) else len(part)
    if i < len(shown):
        there = f"one at {part[i]:.3f} s" if i < len(part) else "none, the video is truncated"
        raise UserError(f"{video}: frame {i} of the episode should be shown at {shown[i]:.3f} s, there is {there}")
    return first


def fill_pattern(dataset: Dataset, pattern: str, about: Row, prefix: str, camera: str = "") -> Path:
    """The file that a pattern of info.json names once the numbers in `about` and the camera are filled in."""
    if re.search(r"[{}]", FIELD.sub("", pattern)):
        allowed = "{chunk_index:03d}, {file_index:03d} and {video_key}"
        raise UserError(f"{dataset.root / INFO}: the pattern {pattern!r:.200} may ask for {allowed} alone")
    name = FIELD.sub(lambda m: camera if m[3] else f"{about.count(prefix + m[1]):0{m[2] or 0}d}", pattern)
    return inside(dataset.root, name, dataset.root / INFO)


def read_parquet(path: Path, columns: Sequence[str], episode: int | None = None) -> list[Row]:
    """The rows of a parquet file, or those of one `episode`: `columns`, where `a/` is all that begin with it."""
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    with reading_with(path, "parquet file", OSError, pyarrow.ArrowException):
        table, what = _read_table(path, (*columns, EPISODE), storage.version(path)), "row"
        if episode is not None:
            table, what = table.filter(compute.field(EPISODE) == episode), f"episode {episode} frame"
        return [Row(f"{path} {what} {i}", row) for i, row in enumerate(table.to_pylist())]


@lru_cache(maxsize=2)  # many episodes share a file
def _read_table(path: Path, columns: Sequence[str], version: Hashable) -> pyarrow.Table:
    with storage.open(path) as file:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        missing = [name for name in columns if name not in names and name[-1] != "/"]
        if missing:
            raise UserError(f"{path} lacks the columns {', '.join(missing)}")
        prefixes = tuple(name for name in columns if name[-1] == "/")
        return table.read(columns=[name for name in names if name in columns or name.startswith(prefixes)])
