"""What is wrong with a recording is one line that names file and row."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_games import game_args, load_game, read_all, refusal

from configs import storage
from configs.cli import run
from configs.errors import RefusedError, UserError
from data_pipeline.__main__ import VERBS
from data_pipeline.readers import Reader, find_recordings, lerobot
from data_pipeline.video import read_frames, write_video

Damage = Callable[[Path], Any]


def lines(name: str, change: Callable[[list[str]], list[str]]) -> Damage:
    """A text file whose lines are changed."""

    def damage(folder: Path) -> None:
        changed = change((folder / name).read_text(errors="replace").splitlines())
        text = "".join(f"{line}\n" for line in changed)
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))

    return damage


def entry(name: str, change: Callable[[Any], Any], line: int = 0) -> Damage:
    """A line of JSON, whose value `change` changes in place."""

    def edit(text: list[str]) -> list[str]:
        loaded = json.loads(text[line])
        change(loaded)
        return [*text[:line], json.dumps(loaded), *text[line + 1 :]]

    return lines(name, edit)


def rows(name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Damage:
    """A parquet file whose rows are changed."""
    return lambda folder: pq.write_table(
        pa.Table.from_pylist(change(pq.read_table(folder / name).to_pylist())), folder / name
    )


def array(name: str, value: Any) -> Damage:
    """An array of the HDF5 file that is another one, or none."""

    def damage(folder: Path) -> None:
        with h5py.File(folder / "hdf5_dm_july2021_1.hdf5", "a") as file:
            del file[name]
            if value is not None:
                file[name] = value

    return damage


def half(name: str) -> Damage:
    """A file that was cut off."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cell(name: str, line: int, column: str, value: str) -> Damage:
    """A table in which one cell is another one."""

    def change(table: list[str]) -> list[str]:
        row = dict(zip(table[0].split(","), table[line - 1].split(","), strict=True)) | {column: value}
        return [*table[: line - 1], ",".join(row.values()), *table[line:]]

    return lines(name, change)


def column(name: str, column: str, value: Any) -> Damage:
    """A parquet file with the same value in all rows of a column."""
    return rows(name, lambda table: [{**row, column: value} for row in table])


def actions(**arrays: Any) -> Damage:
    """Other arrays in the .npy of a video."""
    return lambda folder: np.save(folder / "videos" / "one.npy", np.array(arrays))


def outside(name: str) -> Damage:
    """A file that lies outside of the source; a link leads to it."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return damage


def listed(**files: Any) -> Damage:
    """FastVideo's json, in which the first video has other files."""
    return entry("videos2caption.json", lambda videos: videos[0].update(files))


def about(**facts: Any) -> Damage:
    """Other facts in an episode.json."""
    return lambda folder: (folder / EPISODE).write_text(json.dumps(json.loads((folder / EPISODE).read_text()) | facts))


def info(change: Callable[[Any], Any]) -> Damage:
    return entry("meta/info.json", change)


def vector(**facts: Any) -> Damage:
    """LeRobot's description of the feature `action`."""
    return info(lambda loaded: loaded["features"]["action"].update(facts))


def shifted(by: int) -> Damage:
    """Poses that go by the deltas of a neighbour."""

    def change(facts: dict[str, Any]) -> None:
        entries = list(facts["actions"].values())
        yaws = [entry["yaw"] for entry in entries]
        for i, entry in enumerate(entries):
            entry["yaw"] = yaws[(i + by) % len(yaws)]

    return entry(GF, change)


def begun(held: str) -> Damage:
    """A log of events that begins with what is held then."""
    return lines(OWL, lambda table: [table[0], f'1,START,"{held}"', *table[1:]])


ACTIONS, EPISODE, VIDEO, CAPITALS = (
    f"episode_00000/{name}" for name in ("actions.csv", "episode.json", "video.mp4", "Video.MKV")
)
LOG, VPT, GF, OWL = "one/input.csv", "player-20220102", "metadata/seed_1_part_1.json", "one/inputs.csv"
DATA, ABOUT = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
SCREEN = "observation.images.screen"
FROM = f"videos/{SCREEN}/from_timestamp"

PATTERNS = [  # of paths in LeRobot's info.json
    "../outside/{chunk_index:03d}.mp4", "videos/../../outside.mp4", "/etc/hostname", "{video_key}/../../x.mp4",
    "videos\\x.mp4", "videos/x\0.mp4", "", "videos/}.mp4", ["videos"], "{chunk_index.__class__.__mro__}",
    "{chunk_index:>2000000000}", "{chunk_index:02000000000d}", "{chunk_index!r}", "{chunk_index[0]}", "{{chunk_index}}",
    "{file_index:{chunk_index}}",
]  # fmt: skip
SPACE = {"name": "other", "keys": ["jump"], "caps": [], "mouse": False, "mouse_unit_deg": 1.0}
FAULTS: list[tuple[Any, ...]] = [
    ("worldloom", "29 rows, .* 30 frames", lines(ACTIONS, lambda r: r[:-1])),
    ("worldloom", "columns must be .*'lef'", lines(ACTIONS, lambda r: [r[0].replace("left", "lef"), *r[1:]])),
    ("worldloom", "line 4: yaw_deg is .* no number", cell(ACTIONS, 4, "yaw_deg", "1x")),
    ("worldloom", "line 4: pitch_deg", cell(ACTIONS, 4, "pitch_deg", "nan")),
    ("worldloom", "line 4: yaw turns by -3601", cell(ACTIONS, 4, "yaw_deg", "-3601")),
    ("worldloom", "line 4: back is '0.5'", cell(ACTIONS, 4, "back", "0.5")),
    ("worldloom", "line 4: 3 cells", lines(ACTIONS, lambda r: [*r[:3], "2,0,0", *r[4:]])),
    ("worldloom", "line 4: frame must be 2, not 3", lines(ACTIONS, lambda r: [*r[:3], *r[4:], r[-1]])),
    ("worldloom", "actions.csv has 0 rows", lines(ACTIONS, lambda r: [])),
    ("worldloom", "no file .*actions.csv", gone(ACTIONS)),
    ("worldloom", "no file .*episode.json", gone(EPISODE)),
    ("worldloom", "no video .*video.mp4", gone(VIDEO)),
    ("worldloom", "episode.json is not valid JSON: E", lines(EPISODE, lambda r: ["{"])),
    ("worldloom", "episode.json is not valid JSON", lines(EPISODE, lambda r: ["[" * 200_000])),
    ("worldloom", "episode.json: 'fps' is required", lines(EPISODE, lambda r: ["{}"])),
    ("worldloom", "episode.json says frames -1, .*video.mp4 has 30", about(frames=-1)),
    ("worldloom", "episode.json: frames must be of type int, not None", about(frames=None)),
    ("worldloom", "episode.json says width 160, .*video.mp4 has 48", about(width=160)),
    ("worldloom", "episode.json says fps 30.0, the game 'tiny' has 17.5", about(fps=30.0)),
    ("worldloom", "episode.json: action_space holds settings", about(action_space=None)),
    ("worldloom", "episode.json: 'action_space.name' is required", about(action_space={})),
    ("worldloom", "'other' .jump; no mouse.*'tiny' .forward", about(action_space=SPACE)),
    ("worldloom", "holds Video.MKV and video.mp4", lambda folder: shutil.copy(folder / VIDEO, folder / CAPITALS)),
    ("worldloom", "runs at 30 fps, the game 'tiny' at 17.5",
     lambda folder: write_video(folder / VIDEO, [*read_frames(folder / VIDEO)], 30.0)),
    ("worldloom", "video.mp4 .*truncated", half(VIDEO)),
    ("worldloom", "video.mp4 .*truncated or no video", lines(VIDEO, lambda r: ["hello"])),
    ("frames", "frame 7 has no picture", gone("one/frames/shot-00007.png")),
    ("frames", "shot-00007.png .*truncated", half("one/frames/shot-00007.png")),
    ("frames", "no picture of frame 31", lines(LOG, lambda r: [*r, "w,101.55,31"])),
    ("frames", "line 2: 'q' holds no key", lines(LOG, lambda r: [r[0], "q,100,1", *r[1:]])),
    ("frames", "line .* must ascend", lines(LOG, lambda r: [r[0], *r[:0:-1]])),
    ("frames", "line 2: time is 'x'", lines(LOG, lambda r: [r[0], "w,x,1", *r[1:]])),
    ("frames", "line .* at 22 fps; set game.fps", None, "game.fps=22"),
    ("frames", "hold no mouse", None, "game.action_space.mouse=true"),
    ("vpt", "28 rows, .*mp4 has 30 frames", lines(f"{VPT}.jsonl", lambda r: r[2:])),
    ("vpt", "line 5 is not valid JSON", lines(f"{VPT}.jsonl", lambda r: [*r[:4], "{", *r[5:]])),
    ("vpt", "line 4 has no column 'mouse'", entry(f"{VPT}.jsonl", lambda r: r.pop("mouse"), 3)),
    ("vpt", "line 2: tick 28 after 29", lines(f"{VPT}.jsonl", lambda r: r[::-1])),
    ("vpt", "line .*'mouse_right' holds no key", None, "game.inputs.others=refuse", "game.inputs.keys.use=[]"),
    ("vpt", "no input 'spacebar', but .*space", None, "game.inputs.keys.jump=[spacebar]"),
    ("vpt", "inputs.keys must name all", None, "game.action_space={keys: [dig], caps: []}"),
    ("vpt", "mp4 .*truncated", half(f"{VPT}.mp4")),
    ("vpt", "line 4 is damaged .*float", entry(f"{VPT}.jsonl", lambda r: r["mouse"].update(buttons=[1.0]), 3)),
    ("gf_minecraft", "actions, .* none is left out", entry(GF, lambda r: r["actions"].pop("7"))),
    ("gf_minecraft", "29 entries, .* 30", entry(GF, lambda r: r["actions"].pop("29"))),
    ("gf_minecraft", "entry 5: ws must", entry(GF, lambda r: r["actions"]["5"].update(ws=3))),
    ("gf_minecraft", r"entry 5: yaw_delta is 1e\+300", entry(GF, lambda r: r["actions"]["5"].update(yaw_delta=1e300))),
    ("vpt", r"line 4: mouse.dy is -1e\+39", entry(f"{VPT}.jsonl", lambda r: r["mouse"].update(dy=-1e39), 3)),
    ("csgo", "frame_0_y: yaw turns by", None, "game.inputs.yaw_deg=1e30"),
    ("gf_minecraft", "shifted: .* entry after in 100%", shifted(1)),
    ("gf_minecraft", "shifted: .* entry before in 100%", shifted(-1)),
    ("csgo", "truncated or no HDF5", half("hdf5_dm_july2021_1.hdf5")),
    ("csgo", "29 pictures, but no frame_9_x", array("frame_9_x", None)),
    ("csgo", "9_y must be .*one bin", array("frame_9_y", np.eye(51)[[20, 30, 44]].sum(axis=0))),
    ("csgo", "frame_9_y has the shape", array("frame_9_y", np.zeros(50))),
    ("csgo", "frame_9_y is .* no numbers", array("frame_9_y", "cos\nsystem")),
    ("csgo", "frame_9_x has another size", array("frame_9_x", np.zeros((8, 8, 3), np.uint8))),
    ("csgo", "16 fps, .*'csgo' has 20", None, "game.fps=20"),
    ("lerobot", "episode 0 has 30 rows, .* 31", rows(DATA, lambda r: r[:5] + r[6:])),
    ("lerobot", "frame .: 'a' holds no key", None, "game.inputs.keys.left=[]"),
    ("lerobot", "frame 0: . is 0.5", rows(DATA, lambda r: [{**r[0], "action": [0.5] * 6}, *r[1:]])),
    ("lerobot", "not 6", rows(DATA, lambda r: [{**r[0], "action": [1.0] * 5}, *r[1:]])),
    ("lerobot", "should be sh", rows(ABOUT, lambda r: [{**r[0], FROM: 0.026}, *r[1:]])),
    ("lerobot", "truncated", rows(ABOUT, lambda r: [{**r[0], FROM: 2.0}, *r[1:]])),
    ("lerobot", "there are: observation.images.screen", None, "game.inputs.camera=front"),
    ("lerobot", "axes must name", None, "game.inputs.axes=[look_up,look_right]"),
    ("lerobot", f"row 0 has no .*{FROM}", rows(ABOUT, lambda r: [{k: one[k] for k in one if k != FROM} for one in r])),
    ("lerobot", "cannot read .*file-000.parquet", half(DATA)),
    ("owl_control", "line 7: its time is 1.6", lines(OWL, lambda r: [*r[:6], "1759999998.9,END,", *r[6:]])),
    ("owl_control", "line 2 is damaged", lines(OWL, lambda r: [r[0], "1,KEYBOARD,[87]", *r[1:]])),
    ("owl_control", "line 4: 2 cells", lines(OWL, lambda r: [*r[:3], "1760000000.5,FOCUS"])),
    ("owl_control", "line 2 is damaged", begun('{""keyboard"": null}')),
    ("owl_control", "no VIDEO_START", lines(OWL, lambda r: [i for i in r if "START" not in i])),
    ("owl_control", "7.8 s be", lines(OWL, lambda r: [*r[:-2], "1760000009,VIDEO_END,[]"])),
    ("owl_control", "needs one video and one log", gone("one/recording.mp4")),
    ("owl_control", r"line \d+ is damaged", lines(OWL, lambda r: [*r, "1,KEYBOARD,[87,2]"])),
    ("owl_control", "line .* is damaged", lines(OWL, lambda r: [*r, "1,KEY\x01,[]"])),
    ("owl_control", "line .* event_type is '5'", lines(OWL, lambda r: [*r, "17,5,END,[]"])),
    ("owl_control", "line 4: .*1e", lines(OWL, lambda r: [*r[:3], '1760000000.5,MOUSE_MOVE,"[1e300, 0]"', *r[3:]])),
    ("event_log", "two.mp4: a recording needs one video and one log", gone("two.jsonl")),
    ("event_log", "line 1: what is 'Wheel'; say in game.inputs", entry("two.jsonl", lambda r: r.update(what="Wheel"))),
    ("event_log", ": x (of|is)", lines("one.csv", lambda r: [*r, "900,motion,,1e39,0"])),
    ("event_log", "line 3: t is None", entry("two.jsonl", lambda r: r.update(t=None), 2)),
    ("event_log", "line .*: 6 cells", lines("one.csv", lambda r: [*r, "9,motion,,0,0,0"])),
    ("event_log", "line .* names neither", lines("one.csv", lambda r: [*r, "9,KeyDown,,,"])),
    ("event_log", "'q' holds", lines("one.csv", lambda r: [*r, "650,KeyDown,q,,"])),
    ("event_log", "csv lasts 0.0006.*time_unit", None, "game.inputs.time_unit=us"),
    ("event_log", "nothing happened while", None, "game.inputs.offset_s=-1760000000"),
    ("event_log", "no column 'ms'", None, "game.inputs.columns.time=ms"),
    ("event_log", "columns must be one of .* not 'tme'", None, "game.inputs.columns={tme: t}"),
    ("event_log", "csv has no .*kinds.start .rec", None, "game.inputs.kinds.start=[rec]"),
    ("event_log", "both press and release", None, "game.inputs.kinds={press: [a], release: [A]}"),
    ("event_log", "one.csv .{,200}$", lines("one.csv", lambda r: [*r, f"650,KeyDown,{200_000 * 'w'},,"])),
    ("event_log", "one.csv .{,200}$", lines("one.csv", lambda r: [*r, "650,KeyDown,w\0,,"])),
    ("event_log", "one.csv .{,200}$", lines("one.csv", lambda r: [*r, '650,KeyDown,"w'])),
    ("event_log", "one.csv .{,200}$", lines("one.csv", lambda r: [*r, "650,KeyDown,\udcff,,"])),
    ("table", "line 2: w is 'held'", cell("one.csv", 2, "w", "held")),
    ("table", "line 3: mouse_y is '1e308'", cell("one.csv", 3, "mouse_y", "1e308")),
    ("table", "line 3: mouse_y.* turns by -3600.05 deg", cell("one.csv", 3, "mouse_y", "72001")),
    ("table", "line 4: frame must be 2, not 3", cell("one.csv", 4, "frame", "3")),
    ("table", "line 2 has no column 'up', but frame, w", None, "game.inputs.keys.forward=[up]"),
    ("table", "line 2 has no column 'pressed', but", None, "game.inputs.columns.keys=pressed"),
    ("table", "game.inputs.columns must be one of .* not 'tme'", None, "game.inputs.columns.tme=t"),
    ("table", "set game.inputs.pitch_deg and game.inputs.yaw_deg", None, "game.inputs.yaw_deg=0"),
    ("table", "one.csv has 39 rows, .*one.mp4 has 40 frames", lines("one.csv", lambda r: r[:-1])),
    ("table", "one.csv has 41 rows", lines("one.csv", lambda r: [*r, r[-1]])),
    ("table", "one.csv has two columns 'w'", lines("one.csv", lambda r: [r[0].replace("click", "w"), *r[1:]])),
    ("fastvideo", "holds no keyboard", actions(mouse=np.zeros((40, 2)))),
    ("fastvideo", r"holds no mouse \(40, 2\), but keyboard \(40, 4\)", actions(keyboard=np.ones((40, 4)))),
    ("fastvideo", "row 0: .* 0 is 0.5", actions(keyboard=np.full((40, 4), 0.5), mouse=np.zeros((40, 2)))),
    ("fastvideo", r"row 0: pitch .* 3e\+301", actions(keyboard=np.ones((40, 4)), mouse=np.full((40, 2), 1e300))),
    ("fastvideo", "npy has 3 rows, .*one.mp4 has 40", actions(keyboard=np.ones((3, 4)), mouse=np.zeros((3, 2)))),
    ("fastvideo", "one.npy is damaged", actions(keyboard="wasd")),
    ("fastvideo", "no numbers", actions(keyboard=np.array(["w"]))),
    ("fastvideo", "'../videos', which is no file of", lines("merge.txt", lambda r: ["../videos,a.json"])),
    ("fastvideo", "no file of a folder", lines("merge.txt", lambda r: ["videos,../a.json"])),
    ("fastvideo", "'/etc/passwd', which is not in", lines("merge.txt", lambda r: ["videos,/etc/passwd"])),
    ("fastvideo", "line 1 must be folder,annotations.json", lines("merge.txt", lambda r: ["videos"])),
    ("fastvideo", "line 3: .* names a second video one", lines("merge.txt", lambda r: ["", *r, *r])),
    ("fastvideo", "holds no recordings", lines("merge.txt", lambda r: [])),
    ("fastvideo", "no file of a folder", listed(path="../../outside.mp4")),
    ("fastvideo", "no file of a folder", listed(action_path="")),
    ("fastvideo", "'/outside.npy', which is not in", listed(action_path="/outside.npy")),
    ("fastvideo", "outside; it was not read", outside("videos/one.mp4")),
    ("fastvideo", "outside; it was not read", outside("videos/one.npy")),
    ("fastvideo", "path is None", listed(path=None)),
    ("fastvideo", r"action_path is \['one.npy'\]", listed(action_path=["one.npy"])),
    ("lerobot", "info.json: features", info(lambda loaded: loaded.update(features=[1]))),
    ("lerobot", "info.json: features", info(lambda loaded: loaded["features"].update(other="text"))),
    ("lerobot", "has no feature action or actions, but", info(lambda loaded: loaded["features"].pop("action"))),
    ("lerobot", "must be a vector, not of shape", vector(shape=[10**12])),
    ("lerobot", "info.json is damaged", vector(names={"w": 1, "a": "b"})),
    ("lerobot", "convert_image_to_video", info(lambda loaded: loaded["features"][SCREEN].update(dtype="image"))),
    ("lerobot", "convert_dataset_v21_to_v30", info(lambda loaded: loaded.update(codebase_version="v2.1"))),
    ("lerobot", "31 rows, meta/episodes says 1000000000000", column(ABOUT, "length", 10**12)),
    ("lerobot", "length is -1, which is no count", column(ABOUT, "length", -1)),
    ("lerobot", "episode_index is 'xxx", column(ABOUT, "episode_index", "x" * 10**6)),
    ("lerobot", "row 0: data/file_index is '../x'", column(ABOUT, "data/file_index", "../x")),
    ("lerobot", r"frame 0: timestamp is 1e\+300", column(DATA, "timestamp", 1e300)),
    ("lerobot", r"frame 0: the action is 1e\+300", column(DATA, "action", [1e300] * 6)),
    ("lerobot", "frame 0: yaw turns by 3603 degrees", column(DATA, "action", [0.0] * 5 + [1201.0])),
    ("lerobot", "outside; it was not read", outside(f"videos/{SCREEN}/chunk-000/file-000.mp4")),
    *(("lerobot", "meta/info.json", info(lambda loaded, part=part: loaded.update(part)))
      for pattern in PATTERNS for part in ({"data_path": pattern}, {"video_path": pattern})),
    ("lerobot", "frame 0: the action is 'wasd'", column(DATA, "action", "wasd")),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}: {fault[1]}")
def test_a_fault_is_one_line_that_names_what_is_wrong(fault, sources: dict[str, Path], tmp_path: Path) -> None:
    reader, message, damage, *overrides = fault
    source = tmp_path / "source"
    shutil.copytree(sources[reader], source)
    if damage:
        damage(source)
    error = refusal(reader, source, *overrides)
    assert re.search(message, error)
    assert str(source) in error or "inputs." in error


def test_encode_stops_before_it_writes_with_one_line_and_status_2(sources, codec_folder, tmp_path, capsys):
    folder = tmp_path / "source"
    shutil.copytree(sources["vpt"], folder)
    lines(f"{VPT}.jsonl", lambda found: found[:-2])(folder)
    paths = [f"source={folder}", f"codec={codec_folder}", f"out={tmp_path}/out"]
    assert run("data_pipeline", VERBS, ["encode", *game_args("vpt", tmp_path), *paths, "heldout_every=0"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "28 rows" in said and f"{folder}/{VPT}.jsonl" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("reader", "module"), [("csgo", "h5py"), ("lerobot", "pyarrow")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(reader, module, sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"data_pipeline.readers.{reader}")
    with pytest.raises(UserError, match=rf"reader={reader} needs {module}: pip install 'worldloom\[readers\]'"):
        find_recordings(reader, sources[reader])


def test_a_server_that_refuses_a_table_has_not_sent_a_damaged_one(sources, tmp_path, monkeypatch):
    (first, *_), game = find_recordings("lerobot", sources["lerobot"]), load_game("lerobot", tmp_path)

    def refuse(path: Path) -> None:
        raise RefusedError(f"{path}: the server refuses")

    monkeypatch.setattr(storage, "open", refuse)
    lerobot._read_table.cache_clear()
    with pytest.raises(RefusedError):
        first.read(game)


@pytest.mark.parametrize("reader", get_args(Reader))
def test_a_folder_of_something_else_is_refused(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path / "else")):
        read_all(reader, tmp_path / "else", load_game(reader, tmp_path))
