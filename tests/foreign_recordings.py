"""Recordings in the formats of others, written from their public descriptions; every picture shows its own action.

Frame i carries, in grey cells, what is held from frame i to frame i + 1: a cell per key, one for pitch, one for yaw. So
a test can compare picture and action of every frame, whatever way the pictures took.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.video import write_video

FRAMES, HEIGHT, WIDTH = 30, 64, 112
LEVELS = 5  # of the mouse, -2 to 2
# The inputs in the order of a picture's cells.
WASD = ["w", "a", "s", "d"]
INPUTS = {
    "frames": WASD,
    "vpt": ["w", "s", "a", "d", "space", "left_shift", "left_control", "mouse_left", "mouse_right"],
    "gf_minecraft": ["w", "s", "a", "d", "space", "left_shift", "left_control"],
    "csgo": [*WASD, "space", "left_control", "left_shift", "1", "2", "3", "r", "mouse_left", "mouse_right"],
    "lerobot": WASD,
    "owl_control": [*WASD, "mouse_left"],
    "event_log": [*WASD, "mouse_left"],
    "fastvideo": ["0", "1", "2", "3"],
    "table": [*WASD, "click"],
}
# Degrees (pitch, yaw) of the levels: 20 px x 360 / 2400; 0.2 x 15; 60 px x 0.05; bins of 10 and 50 or 60 px x 0.055.
THREES = np.array([[-6, -3, 0, 3, 6], [-6, -3, 0, 3, 6]])
LEVEL_DEG = dict.fromkeys(INPUTS, THREES)
LEVEL_DEG["csgo"] = 0.055 * np.array([[-50, -10, 0, 10, 50], [-60, -10, 0, 10, 60]])


class Play(NamedTuple):
    """What is held in each frame's interval."""

    keyboard: np.ndarray  # (n k) 0 or 1
    levels: np.ndarray  # (n 2) -2 to 2: pitch up, yaw right


def draw_play(frames: int, keys: int, seed: int = 0, mouse: bool = True) -> Play:
    """Anything may change from frame to frame, so that one frame of shift shows."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-2, 3, (frames, 2)) if mouse else np.zeros((frames, 2), dtype=int)
    return Play(rng.integers(0, 2, (frames, keys)), levels)


def paint(play: Play, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Pictures (n h w 3) uint8."""
    values = np.concatenate([200 * play.keyboard + 28, 50 * (play.levels + 2) + 28], axis=1)
    pictures = np.full((len(values), height, width, 3), 128, dtype=np.uint8)
    for cell in range(values.shape[1]):
        rows, columns = _cell(cell, values.shape[1], height, width, 0.1)
        pictures[:, rows, columns] = values[:, cell, None, None, None]
    return pictures


def read_picture(picture: np.ndarray, keys: int) -> Play:
    """What a picture (h w 3) shows, one row."""
    spots = [_cell(cell, keys + 2, picture.shape[0], picture.shape[1], 0.35) for cell in range(keys + 2)]
    values = (np.array([picture[spot].astype(float).mean() for spot in spots]) - 28) / 200
    return Play(values[:keys].round().astype(int), (4 * values[keys:]).round().astype(int) - 2)


def _cell(cell: int, cells: int, height: int, width: int, margin: float) -> tuple[slice, slice]:
    """Two rows of cells in the middle of the picture, where a crop leaves them."""
    columns = -(-cells // 2)
    h, w = height / 2, 0.8 * width / columns
    top, left = h * (cell % 2), 0.1 * width + w * (cell // 2)
    return slice(round(top + margin * h), round(top + (1 - margin) * h)), slice(
        round(left + margin * w), round(left + (1 - margin) * w)
    )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table, csv or jsonl."""
    if path.suffix == ".jsonl":
        write_lines(path, map(json.dumps, rows))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def change_lines(log: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """A jsonl whose objects `change` changes in place."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    change(lines)
    write_lines(log, map(json.dumps, lines))


def write_frames(folder: Path, play: Play, keys: Sequence[str], fps: float, first: int = 1) -> None:
    """Pictures numbered from `first` on and `input.csv`."""
    (folder / "frames").mkdir(parents=True)
    for i, picture in enumerate(paint(play)):
        Image.fromarray(picture).save(folder / "frames" / f"shot-{first + i:05d}.png")
    held = [(i, key) for i, row in enumerate(play.keyboard) for key in compress(keys, row)]
    rows = [f"{key},{100 + (i + 0.3) / fps:.4f},{first + i}" for i, key in held]
    write_lines(folder / "input.csv", ["key,time,frame", *rows])


VPT_KEYS = [f"key.keyboard.{key}" for key in ("w", "s", "a", "d", "space", "left.shift", "left.control")]


def write_vpt(folder: Path, name: str, play: Play, gui: Iterable[int] = (), skipped_at: int | None = None) -> None:
    """An mp4 and its jsonl. In the frames `gui` a GUI is open; before `skipped_at` the recorder left out ten ticks."""
    lines = []
    for i, (held, (pitch, yaw)) in enumerate(zip(play.keyboard, play.levels, strict=True)):
        tick = i + (10 if skipped_at is not None and i >= skipped_at else 0)
        moved = {"x": 640.0, "y": 360.0, "dx": 20.0 * yaw, "dy": -20.0 * pitch}
        mouse = moved | {"buttons": np.flatnonzero(held[len(VPT_KEYS) :]).tolist(), "newButtons": []}
        keyboard = {"keys": [*compress(VPT_KEYS, held)], "newKeys": [], "chars": ""}
        others = {
            "isGuiOpen": i in set(gui),
            "hotbar": 0,
            "yaw": 12.5,
            "tick": tick,
            "milli": 1649575088006 + 50 * tick,
        }
        lines.append(json.dumps({"mouse": mouse, "keyboard": keyboard, **others}))
    write_lines(folder / f"{name}.jsonl", lines)
    write_video(folder / f"{name}.mp4", paint(play), 20.0)


def draw_gf_play(frames: int, seed: int = 0) -> Play:
    """w, s, a, d, space, left_shift, left_control as the three enumerations allow them."""
    rng = np.random.default_rng(seed)
    parts = [np.eye(count + 1, dtype=int)[rng.integers(0, count + 1, frames)][:, 1:] for count in (2, 2, 3)]
    return Play(np.concatenate(parts, axis=1), rng.integers(-2, 3, (frames, 2)))


def gf_entries(play: Play) -> list[dict[str, Any]]:
    """Entry i + 1 is action i, with the pose after it; entry 0 is nonsense."""
    entries = [{"ws": 1, "ad": 2, "scs": 3, "pitch": 0.0, "yaw": 0.0, "pitch_delta": 4.0, "yaw_delta": -4.0}]
    for keys, (pitch, yaw) in zip(play.keyboard, play.levels, strict=True):
        ws, ad, scs = (int(part @ np.arange(1, 1 + len(part))) for part in np.split(keys, [2, 4]))
        pose = {"pitch": entries[-1]["pitch"] - 3.0 * pitch, "yaw": (entries[-1]["yaw"] + 3.0 * yaw + 180) % 360 - 180}
        deltas = {"pitch_delta": -0.2 * pitch, "yaw_delta": 0.2 * yaw}
        entries.append({"ws": ws, "ad": ad, "scs": scs, **pose, **deltas, "pos": [0.0, 64.0, 0.0]})
    return entries


def write_gf(folder: Path, name: str, play: Play, entries: list[dict[str, Any]] | None = None) -> None:
    """`video/` and `metadata/`, with one entry per frame: the last frame's action is not known."""
    entries = gf_entries(play)[:-1] if entries is None else entries
    write_video(folder / "video" / f"{name}.mp4", paint(play), 16.0)
    facts = {"biome": "plains", "actions": {str(i): entry for i, entry in enumerate(entries)}}
    write_lines(folder / "metadata" / f"{name}.json", [json.dumps(facts)])


def write_csgo(path: Path, play: Play, extra: dict[str, Any] | None = None) -> None:
    """An HDF5 file of 150 x 280 px, BGR; keys in the order of the dataset."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = paint(play, 150, 280)
    pictures[:, :4] = (255, 0, 0)  # a red line, to tell RGB from BGR
    xs, ys = {-2: 5, -1: 8, 0: 11, 1: 14, 2: 17}, {2: 2, 1: 4, 0: 7, -1: 10, -2: 12}
    with h5py.File(path, "w") as file:
        for i, (picture, held, (pitch, yaw)) in enumerate(zip(pictures, play.keyboard, play.levels, strict=True)):
            row = np.concatenate([held, np.eye(23)[xs[yaw]], np.eye(15)[ys[pitch]]])
            file[f"frame_{i}_x"], file[f"frame_{i}_y"] = picture[:, :, ::-1], row
            file[f"frame_{i}_xaux"], file[f"frame_{i}_helperarr"] = np.zeros(54), np.zeros(2)
        for name, value in (extra or {}).items():
            file[name] = value


def write_lerobot(root: Path, plays: Sequence[Play], fps: float = 20.0) -> None:
    """Two episodes in the first parquet file and mp4, the others in the second; a row group per episode."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {
        "observation.images.screen": {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "c"]},
        "action": {"dtype": "float32", "shape": [6], "names": {"motors": [*WASD, "look_down", "look_right"]}},
        **{name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index")},
    }
    path = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    info = {"codebase_version": "v3.0", "fps": fps, "features": features, "total_episodes": len(plays)}
    info |= {"data_path": f"data/{path}.parquet", "video_path": f"videos/{{video_key}}/{path}.mp4"}
    write_lines(root / "meta" / "info.json", [json.dumps(info)])
    abouts = []
    for number, part in enumerate((plays[:2], plays[2:])):
        places, tables, first = {"chunk_index": 0, "file_index": number}, [], 0
        for index, play in enumerate(part, start=2 * number):
            n, vectors = len(play.levels), np.concatenate([play.keyboard, play.levels * (-1, 1)], axis=1)
            columns = {
                "action": pa.array(vectors.tolist(), pa.list_(pa.float32())),
                "timestamp": pa.array(np.arange(n) / fps, pa.float32()),
                "frame_index": np.arange(n),
                "episode_index": np.full(n, index),
                "index": first + np.arange(n),
            }
            tables.append(pa.table(columns))
            times = {"from_timestamp": first / fps, "to_timestamp": (first + n) / fps}
            videos = {f"videos/observation.images.screen/{name}": value for name, value in (places | times).items()}
            data = {f"data/{name}": value for name, value in places.items()}
            abouts.append({"episode_index": index, "length": n, **data, **videos, "stats/action/max": [1.0]})
            first += n
        file = root / f"data/{path}.parquet".format(**places)
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(file, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
        video = root / "videos" / "observation.images.screen" / f"{path}.mp4".format(**places)
        write_video(video, np.concatenate([paint(play) for play in part]), fps)
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(abouts), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")


def write_fastvideo(root: Path, plays: dict[str, Play], plain: bool = False) -> None:
    """`merge.txt` as FastVideo has it, relative to where it is started; `plain`: actions without a mouse."""
    items = []
    for name, play in plays.items():
        write_video(root / "videos" / f"{name}.mp4", paint(play), 25.0)
        rows = {"keyboard": play.keyboard.astype(np.float32), "mouse": (0.1 * play.levels).astype(np.float32)}
        np.save(root / "videos" / f"{name}.npy", rows["keyboard"] if plain else np.array(rows))
        items.append({"path": f"{name}.mp4", "action_path": f"{name}.npy", "cap": "a game", "fps": 25.0})
    write_lines(root / "merge.txt", [f"data/{root.name}/videos,data/{root.name}/videos2caption.json"])
    write_lines(root / "videos2caption.json", [json.dumps(items)])


def write_table(path: Path, play: Play, fps: float = 30.0) -> None:
    """A table, csv or jsonl, of one row per frame, and the mp4 of its name."""
    names = ["frame", *INPUTS["table"], "mouse_y", "mouse_x"]
    table = np.column_stack([np.arange(len(play.levels)), play.keyboard, play.levels * (-60, 60)]).astype(int)
    write_rows(path, [dict(zip(names, row, strict=True)) for row in table.tolist()])
    write_video(path.with_suffix(".mp4"), paint(play), fps)


Row = tuple[float, str, Any]  # of an owl-control log: seconds, type, arguments


def owl_rows(play: Play, fps: float = 60.0, start: float = 1760000000.5) -> list[Row]:
    """The log begins 0.7 s before the video; keys change a tenth into an interval, the mouse moves thrice in it."""
    rows: list[Row] = [(start - 0.7, "START", {"keyboard": [], "mouse": []}), (start, "VIDEO_START", [])]
    before = np.zeros(play.keyboard.shape[1])
    for i, (held, (pitch, yaw)) in enumerate(zip(play.keyboard, play.levels, strict=True)):
        for key in np.flatnonzero(held != before):
            name = INPUTS["owl_control"][key]
            kind, code = ("KEYBOARD", ord(name.upper())) if name in WASD else ("MOUSE_BUTTON", 1)
            rows.append((start + (i + 0.1) / fps, kind, [code, bool(held[key])]))
        rows += [(start + (i + at) / fps, "MOUSE_MOVE", [20 * int(yaw), -20 * int(pitch)]) for at in (0.2, 0.5, 0.9)]
        before = held
    end = start + len(play.levels) / fps
    return [*rows, (end + 0.001, "VIDEO_END", []), (end + 0.3, "END", {"keyboard": [], "mouse": []})]


def log_rows(play: Play, fps: float = 60.0) -> list[dict[str, Any]]:
    """The same in the words of somebody else: milliseconds since the video began, buttons by number."""
    rows: list[dict[str, Any]] = []
    for time, kind, args in owl_rows(play, fps, start=0.0):
        if kind == "MOUSE_MOVE":
            rows.append({"t": 1000 * time, "what": "motion", "x": args[0], "y": args[1]})
        elif kind in ("KEYBOARD", "MOUSE_BUTTON"):
            name = chr(args[0]).lower() if kind == "KEYBOARD" else "mouse_left"
            rows.append({"t": 1000 * time, "what": "KeyDown" if args[1] else "KeyUp", "input": name})
    return rows


def write_event_log(log: Path, play: Play, rows: Sequence[dict[str, Any]], fps: float = 60.0) -> None:
    """A log, csv or jsonl, and the mp4 of its name."""
    write_rows(log, rows)
    write_video(log.with_suffix(".mp4"), paint(play), fps)


def write_owl(folder: Path, play: Play, rows: Iterable[Row]) -> None:
    """A folder with mp4, log and metadata."""
    named = [{"timestamp": f"{t:.6f}", "event_type": kind, "event_args": json.dumps(args)} for t, kind, args in rows]
    write_rows(folder / "inputs.csv", named)
    write_video(folder / "recording.mp4", paint(play), 60.0)
    write_lines(folder / "metadata.json", [json.dumps({"game_exe": "game.exe"})])
