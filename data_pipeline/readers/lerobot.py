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
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.foreign import inside, reading
from configs.game import GameConfig
from data_pipeline.readers.keys import bind_keys, scale_mouse
from data_pipeline.readers.logs import read_json, read_number
from data_pipeline.readers.recording import (
    Format,
    Recording,
    check_times,
    import_extra,
    list_files,
    list_folders,
    probe_footage,
)
from data_pipeline.types import Actions, Episode
from data_pipeline.video import frame_times

INFO, EPISODES, ACTIONS, EPISODE = "meta/info.json", "meta/episodes", ("action", "actions"), "episode_index"
COMPONENTS = 10_000  # more than any vector of keys and axes has
# What a pattern of info.json may ask for; str.format would give it attributes and widths of any size.
FIELD = re.compile(r"\{(?:(chunk_index|file_index)(?::0(\d)d)?|(video_key))\}")
CONVERT = "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=NAME --push-to-hub=false --root="
CONVERT_IMAGES = "lerobot-edit-dataset --repo_id NAME --root FOLDER --operation.type convert_image_to_video"


class Dataset(NamedTuple):
    """A folder in this format."""

    root: Path
    info: Path
    data_path: str
    video_path: str
    features: Mapping[str, Mapping[str, Any]]

    @property
    def action(self) -> str:
        """The feature that is the action."""
        found = [name for name in ACTIONS if name in self.features]
        if not found:
            raise UserError(f"{self.info} has no feature {' or '.join(ACTIONS)}, but {', '.join(self.features):.300}")
        return found[0]

    @property
    def components(self) -> list[str]:
        """The names of the action vector's components."""
        feature = self.features[self.action]
        names, shape = feature.get("names"), feature.get("shape")
        if not isinstance(shape, list) or [type(part) for part in shape] != [int] or not 0 < shape[0] < COMPONENTS:
            raise UserError(f"{self.info}: the feature {self.action} must be a vector, not of shape {shape!r:.80}")
        with reading(self.info):
            if isinstance(names, dict):  # {"motors": [...]} or {"w": 0, "a": 1, ...}
                groups = [group for group in names.values() if isinstance(group, list)]
                names = groups[0] if groups else [name for _, name in sorted((at, name) for name, at in names.items())]
            names = [str(name) for name in names or range(shape[0])]
        if len(names) != shape[0] or len(set(names)) != len(names):
            given = ", ".join(names)
            raise UserError(f"{self.info}: {self.action} has {shape[0]} components and the names {given:.200}")
        return names

    def camera(self, wanted: str | None) -> str:
        """The feature that is the picture."""
        cameras, pictures = (
            [name for name, feature in self.features.items() if feature.get("dtype") == kind]
            for kind in ("video", "image")
        )
        if pictures and (wanted in pictures or not cameras):
            raise UserError(f"{self.info}: {wanted or pictures[0]} has its pictures in the tables: {CONVERT_IMAGES}")
        if not self.video_path:
            raise UserError(f"{self.info} lacks video_path")
        if wanted not in cameras and (wanted or len(cameras) != 1):
            there = ", ".join(cameras) or "none"
            raise UserError(f"{self.info}: choose a video by game.inputs.camera; there are: {there}")
        return wanted or cameras[0]


def find_recordings(source: str | Path) -> list[Recording]:
    """The episodes of the dataset `source`, by number; the parquet files in `meta/episodes` are read."""
    dataset = read_info(storage.path(source))
    files = [file for folder in list_folders(dataset.root / EPISODES) for file in list_files(folder, ".parquet")]
    abouts = sorted((about for file in files for about in read_abouts(file)), key=lambda about: about[EPISODE])
    if not abouts:
        raise UserError(f"{dataset.root / EPISODES} lists no episodes")
    twice = [one for one, other in pairwise(abouts) if one[EPISODE] == other[EPISODE]]
    if twice:
        raise UserError(f"{dataset.root / EPISODES} lists {_name(twice[0])} twice")
    return [Recording(_name(about), partial(read_episode, dataset, about)) for about in abouts]


FORMAT = Format(find_recordings, scaled_mouse=True)


def read_abouts(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of `meta/episodes`."""
    abouts = read_rows(file, (EPISODE, "length", "data/", "videos/"))
    for i, about in enumerate(abouts):
        for column in (EPISODE, "length"):
            if not isinstance(about[column], int) or about[column] < 0:
                raise UserError(f"{file} row {i}: {column} is {about[column]!r:.80}, which is no count")
    return abouts


def _name(about: Mapping[str, Any]) -> str:
    return f"episode_{about[EPISODE]:06d}"


def read_info(root: Path) -> Dataset:
    """What `meta/info.json` says."""
    path = root / INFO
    info = read_json(path)
    missing = [name for name in ("codebase_version", "features", "data_path") if not info.get(name)]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    version = str(info["codebase_version"])
    if not version.startswith("v3."):
        raise UserError(f"{path} is of version {version:.20}; convert it, in place: {CONVERT}{root}")
    features, paths = info["features"], (info["data_path"], info.get("video_path") or "")
    if not isinstance(features, dict) or not all(isinstance(pattern, str) for pattern in paths):
        raise UserError(f"{path}: features must be an object, data_path and video_path texts")
    wrong = [name for name, feature in features.items() if not isinstance(feature, dict)]
    if wrong:
        raise UserError(f"{path}: the feature {wrong[0]:.80} must be an object, not {features[wrong[0]]!r:.80}")
    return Dataset(root, path, *paths, features)


def read_episode(dataset: Dataset, about: Mapping[str, Any], game: GameConfig) -> list[Episode]:
    """The one episode that the row `about` of `meta/episodes` describes."""
    camera, index, length = dataset.camera(game.inputs.camera), about[EPISODE], about["length"]
    table = fill_pattern(dataset, dataset.data_path, about, "data/")
    video = fill_pattern(dataset, dataset.video_path, about, f"videos/{camera}/", camera)
    rows, where = read_rows(table, (dataset.action, "timestamp", "frame_index"), index), f"{table} episode {index}"
    if len(rows) != length or [row["frame_index"] for row in rows] != list(range(len(rows))):
        raise UserError(f"{where} must have the rows frame_index 0 to {length - 1} in order; it has {len(rows)} rows")
    if not rows:
        return []
    actions = read_actions(where, dataset.components, [row[dataset.action] for row in rows], game)
    column = f"videos/{camera}/from_timestamp"
    begin = read_number(about.get(column), f"{dataset.root / EPISODES} {_name(about)}: {column}")
    shown = [begin + read_number(row["timestamp"], f"{where} frame {i}: timestamp") for i, row in enumerate(rows)]
    footage = replace(probe_footage(video), frames=len(rows))
    first = find_first(video, np.array(shown), game.fps)
    check_times(video, frame_times(video)[first : first + len(rows)], game)  # episodes may lie apart in it
    return [Episode(_name(about), actions, footage, first, first + len(rows))]


def read_actions(where: str, components: list[str], vectors: Sequence[Any], game: GameConfig) -> Actions:
    """The rows of `action` (n c) as the game's actions; `where` names file and episode in errors."""
    axes = game.inputs.axes if game.action_space.mouse else ()
    if len(axes) != 2 * game.action_space.mouse or not set(axes) <= set(components):
        there = ", ".join(components)
        raise UserError(f"game.inputs.axes must name the mouse's y and x of {there}, or set action_space.mouse=false")
    names = [name for name in components if name not in axes]
    keys = bind_keys(game, names)
    table = _vectors(where, vectors, len(components))
    columns = dict(zip(components, table.T, strict=True))
    keyboard = keys.rows(names, np.stack([columns[name] for name in names], axis=1), lambda i: f"{where} frame {i}")
    moves = np.stack([columns[name] for name in axes], axis=1) if axes else np.zeros((len(table), 2))
    return Actions(keyboard, scale_mouse(game, moves, lambda i: f"{where} frame {i}"))


def _vectors(where: str, vectors: Sequence[Any], count: int) -> np.ndarray:
    for i, vector in enumerate(vectors):
        if not isinstance(vector, list) or len(vector) != count:
            raise UserError(f"{where} frame {i}: the action is {vector!r:.80}, not {count} numbers")
    table = [[read_number(part, f"{where} frame {i}: the action") for part in one] for i, one in enumerate(vectors)]
    return np.array(table, dtype=np.float64)


def find_first(video: Path, shown: np.ndarray, fps: float) -> int:
    """The number of the frame at `shown[0]`, given when an episode's frames are shown, (n) seconds.

    Raises UserError if one of them is not in the video at its time, within a quarter of a frame.
    """
    times = frame_times(video)
    first = int(np.argmin(np.abs(times - shown[0])))
    part = times[first : first + len(shown)]
    found = np.pad(part, (0, len(shown) - len(part)), constant_values=np.inf)
    wrong = np.flatnonzero(~(np.abs(found - shown) < 0.25 / fps))
    if len(wrong):
        i = int(wrong[0])
        there = f"one at {found[i]:.3f} s" if np.isfinite(found[i]) else "none, the video is truncated"
        raise UserError(f"{video}: frame {i} of the episode should be shown at {shown[i]:.3f} s, there is {there}")
    return first


def fill_pattern(dataset: Dataset, pattern: str, about: Mapping[str, Any], prefix: str, camera: str = "") -> Path:
    """The file that a pattern of info.json gives for an episode: the numbers in `about` and the video's name are filled
    in, and it lies in the dataset."""

    def fill(field: re.Match[str]) -> str:
        if field[3]:
            return camera
        number = about.get(prefix + field[1])
        if not isinstance(number, int) or number < 0:
            name = f"{prefix}{field[1]} of {_name(about)}"
            raise UserError(f"{dataset.info}: {name} is {number!r:.80}, no number for the pattern {pattern!r:.200}")
        return f"{number:0{field[2] or 0}d}"

    if re.search(r"[{}]", FIELD.sub("", pattern)):
        allowed = "{chunk_index:03d}, {file_index:03d} and {video_key}"
        raise UserError(f"{dataset.info}: the pattern {pattern!r:.200} may ask for {allowed} alone")
    return inside(dataset.root, FIELD.sub(fill, pattern), dataset.info)


def read_rows(path: Path, columns: Sequence[str], episode: int | None = None) -> list[dict[str, Any]]:
    """The rows of a parquet file, of one `episode` if it is given, as plain values: `columns`, and all that begin with
    those that end in a slash."""
    arrow, compute = (import_extra(module) for module in ("pyarrow", "pyarrow.compute"))
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    with reading(path):
        try:
            if episode is None:
                return _read_table(path, columns).to_pylist()
            table = _kept_table(path, (*columns, EPISODE), storage.version(path))
            return table.filter(compute.equal(table[EPISODE], episode)).to_pylist()
        except (OSError, arrow.ArrowException) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"cannot read {path} ({said}); it is truncated or no parquet file") from error


@lru_cache(maxsize=2)  # many episodes share a file
def _kept_table(path: Path, columns: Sequence[str], version: Hashable) -> Any:
    return _read_table(path, columns)


def _read_table(path: Path, columns: Sequence[str]) -> Any:
    parquet = import_extra("pyarrow.parquet")
    with storage.open(path) as file:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        missing = [name for name in columns if name not in names and name[-1] != "/"]
        if missing:
            raise UserError(f"{path} lacks the columns {', '.join(missing)}")
        prefixes = tuple(name for name in columns if name[-1] == "/")
        return table.read(columns=[name for name in names if name in columns or name.startswith(prefixes)])
