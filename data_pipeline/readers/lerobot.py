"""LeRobot's dataset format v3: `meta/`, `data/` and `videos/`; many episodes share a parquet file and an mp4.

`meta/info.json` names features and paths, `meta/episodes/` says where each episode's rows and pictures lie. Row i of an
episode (`frame_index` i) holds the `action` that was sent on seeing frame i (LeRobot's recording loop takes the
observation, then the action), so it is action i and leads to frame i + 1. Its picture is the one at `from_timestamp` +
`timestamp` of row i in the episode's video (`_query_videos`), and is looked for at that time among the times that the
video itself gives, within a quarter of a frame.

`action` is a vector of named components (`names` in info.json; their numbers where there are none). `game.inputs.keys`
binds keys to components, which must then be 0 or 1; `game.inputs.axes` names the components that are the mouse's y and
x, and `pitch_deg` and `yaw_deg` say how many degrees up and right one unit of them is.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import storage
from data_pipeline.readers.keys import bind_keys, mouse_rows, require_mouse_scale
from data_pipeline.readers.recording import (
    Recording,
    VideoEpisode,
    import_extra,
    list_files,
    list_folders,
    probe_video,
    read_json,
    read_number,
)
from data_pipeline.types import Actions, GameConfig
from data_pipeline.video import frame_times

INFO, EPISODES, ACTION, EPISODE = "meta/info.json", "meta/episodes", "action", "episode_index"


@dataclass(frozen=True)
class Dataset:
    """A folder in this format."""

    root: Path
    data_path: str
    video_path: str
    features: Mapping[str, Any]

    @property
    def info(self) -> Path:
        return self.root / INFO

    @property
    def components(self) -> list[str]:
        """The names of the action vector's components."""
        feature = self.features.get(ACTION, {})
        names, shape = feature.get("names"), feature.get("shape")
        if not isinstance(shape, list) or len(shape) != 1:
            raise ValueError(f"{self.info}: the feature {ACTION} must be a vector, not of shape {shape}")
        if isinstance(names, dict):  # {"motors": [...]} or {"w": 0, "a": 1, ...}
            groups = [group for group in names.values() if isinstance(group, list)]
            names = groups[0] if groups else sorted(names, key=lambda name: names[name])
        names = [str(name) for name in names or range(shape[0])]
        if len(names) != shape[0] or len(set(names)) != len(names):
            raise ValueError(f"{self.info}: {ACTION} has {shape[0]} components and the names {', '.join(names)}")
        return names

    def camera(self, wanted: str | None) -> str:
        """The feature that is the picture."""
        cameras = [name for name, feature in self.features.items() if feature.get("dtype") == "video"]
        if wanted not in cameras and (wanted or len(cameras) != 1):
            raise ValueError(
                f"{self.info}: choose a video by game.inputs.camera; there are: {', '.join(cameras) or 'none'}"
            )
        return wanted or cameras[0]


def find_recordings(source: str | Path) -> list[Recording]:
    """The episodes of the dataset `source`, by number; the parquet files in `meta/episodes` are read."""
    dataset = read_info(storage.path(source))
    files = [file for folder in list_folders(dataset.root / EPISODES) for file in list_files(folder, ".parquet")]
    abouts = [about for file in files for about in read_rows(file, (EPISODE, "length", "data/", "videos/"))]
    if not abouts:
        raise ValueError(f"{dataset.root / EPISODES} lists no episodes")
    abouts.sort(key=lambda about: about[EPISODE])
    return [Recording(_name(about), partial(read_episode, dataset, about)) for about in abouts]


def _name(about: Mapping[str, Any]) -> str:
    return f"episode_{about[EPISODE]:06d}"


def read_info(root: Path) -> Dataset:
    """What `meta/info.json` says. Raises ValueError for another version of the format."""
    info = read_json(root / INFO)
    missing = [name for name in ("codebase_version", "features", "data_path", "video_path") if not info.get(name)]
    if missing:
        raise ValueError(f"{root / INFO} lacks {', '.join(missing)}")
    version = str(info["codebase_version"])
    if not version.startswith("v3."):
        raise ValueError(f"{root / INFO} is of version {version}; convert it to v3.0 with LeRobot")
    return Dataset(root, info["data_path"], info["video_path"], info["features"])


def read_episode(dataset: Dataset, about: Mapping[str, Any], game: GameConfig) -> list[VideoEpisode]:
    """The one episode that the row `about` of `meta/episodes` describes.

    Raises ValueError in one line: rows or pictures left out or out of time, another fps, a component that is bound
    to no key.
    """
    camera = dataset.camera(game.inputs.camera)
    table = _file(dataset, dataset.data_path, about, "data/")
    video = _file(dataset, dataset.video_path, about, f"videos/{camera}/", video_key=camera)
    index = about[EPISODE]
    rows = read_rows(table, (ACTION, "timestamp", "frame_index"), index)
    if [row["frame_index"] for row in rows] != list(range(about["length"])):
        raise ValueError(
            f"{table}: episode {index} must have the rows frame_index 0 to {about['length'] - 1} in order; it has "
            f"{len(rows)} rows"
        )
    actions = read_actions(f"{table} episode {index}", dataset.components, [row[ACTION] for row in rows], game)
    info = probe_video(video, game)
    column = f"videos/{camera}/from_timestamp"
    begin = read_number(about.get(column), f"{dataset.root / EPISODES} {_name(about)}: {column}")
    shown = begin + np.array([row["timestamp"] for row in rows])
    first = find_first(video, shown, game.fps)
    size = info.height, info.width
    return [VideoEpisode(_name(about), video, first, game.fps, *size, game.action_space, actions)]


def read_actions(where: str, components: list[str], vectors: Sequence[Any], game: GameConfig) -> Actions:
    """The rows of `action` (n c) as the game's actions; `where` names file and episode in errors."""
    axes = game.inputs.axes if game.action_space.mouse else ()
    keys = bind_keys(game, [name for name in components if name not in axes], "these LeRobot recordings")
    require_mouse_scale(game, "LeRobot recordings")
    unknown = [name for name in axes if name not in components]
    if unknown or len(axes) != 2 * game.action_space.mouse:
        raise ValueError(
            f"game.inputs.axes must name the mouse's y and x of {', '.join(components)}, not {list(axes)}; or set "
            "action_space.mouse=false"
        )
    unbound = [name for name in components if name not in keys.places and name not in axes]
    if unbound and game.inputs.others == "refuse":
        raise ValueError(
            f"{where}: {', '.join(unbound)} holds no key of {game.name!r}; bind it in game.inputs.keys or set "
            "game.inputs.others=drop"
        )
    table = _vectors(where, vectors, len(components))
    keyboard = np.zeros((len(table), len(game.action_space.keys)), dtype=np.float32)
    for name, places in keys.places.items():
        column = table[:, components.index(name)]
        wrong = np.flatnonzero(~np.isin(column, (0, 1)))
        if len(wrong):
            raise ValueError(f"{where} frame {wrong[0]}: {name} is {column[wrong[0]]:g}; a key must be 0 or 1")
        keyboard[:, places] = np.maximum(keyboard[:, places], column[:, None])
    degrees = (
        table[:, [components.index(name) for name in axes]] * (game.inputs.pitch_deg, game.inputs.yaw_deg)[: len(axes)]
    )
    return Actions(keyboard, mouse_rows(game, degrees))


def find_first(video: Path, shown: np.ndarray, fps: float) -> int:
    """The number of the frame at `shown[0]`, given when an episode's frames are shown, (n) seconds.

    Raises ValueError if one of them is not in the video at its time, within a quarter of a frame.
    """
    times = frame_times(video)
    first = int(np.argmin(np.abs(times - shown[0])))
    found = np.full(len(shown), np.inf)
    part = times[first : first + len(shown)]
    found[: len(part)] = part
    wrong = np.flatnonzero(~(np.abs(found - shown) < 0.25 / fps))
    if len(wrong):
        i = int(wrong[0])
        there = f"one at {found[i]:.3f} s" if np.isfinite(found[i]) else "none, the video is truncated"
        raise ValueError(f"{video}: frame {i} of the episode should be shown at {shown[i]:.3f} s, there is {there}")
    return first


def read_rows(path: Path, columns: Sequence[str], episode: int | None = None) -> list[dict[str, Any]]:
    """The rows of a parquet file as plain values: `columns`, and all that begin with those that end in a slash.

    With `episode` only those of this one; the two files last read so are kept, since many episodes share one.
    """
    arrow, compute = (import_extra(name, "LeRobot recordings") for name in ("pyarrow", "pyarrow.compute"))
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if episode is None:
            return _read_table(path, columns).to_pylist()
        table = _kept_table(path, (*columns, EPISODE), storage.version(path))
        return table.filter(compute.equal(table[EPISODE], episode)).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"cannot read {path} ({error}); it is truncated or no parquet file") from error


@lru_cache(maxsize=2)
def _kept_table(path: Path, columns: Sequence[str], version: Hashable) -> Any:
    return _read_table(path, columns)


def _read_table(path: Path, columns: Sequence[str]) -> Any:
    parquet = import_extra("pyarrow.parquet", "LeRobot recordings")
    with storage.opened(path) as file:
        names = parquet.read_schema(file).names
    wanted = [name for name in names if name in columns or name.startswith(tuple(c for c in columns if c[-1] == "/"))]
    missing = [name for name in columns if name not in wanted and name[-1] != "/"]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    with storage.opened(path) as file:
        return parquet.read_table(file, columns=wanted)


def _file(dataset: Dataset, pattern: str, about: Mapping[str, Any], prefix: str, **names: str) -> Path:
    """The file that the pattern of info.json gives for an episode."""
    try:
        numbers = {name: about[prefix + name] for name in ("chunk_index", "file_index")}
        return dataset.root / pattern.format(**numbers, **names)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{dataset.info}: {pattern!r} and meta/episodes do not go together: no {error}") from error


def _vectors(where: str, vectors: Sequence[Any], count: int) -> np.ndarray:
    for i, vector in enumerate(vectors):
        if not isinstance(vector, list) or len(vector) != count or None in vector:
            raise ValueError(f"{where} frame {i}: {ACTION} is {vector!r}, not {count} numbers")
    table = np.array(vectors, dtype=np.float64)
    if not np.isfinite(table).all():
        raise ValueError(f"{where} frame {np.flatnonzero(~np.isfinite(table).all(axis=1))[0]}: {ACTION} is not finite")
    return table
