"""What is wrong with a foreign recording is one line that names file and row."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_games import load_game, read_all, words

from configs import storage
from configs.cli import run
from configs.errors import RefusedError
from data_pipeline.__main__ import VERBS
from data_pipeline.readers import READERS, Reader, find_recordings, lerobot

Damage = Callable[[Path], Any]


class Fault(NamedTuple):
    reader: Reader
    damage: Damage | None
    said: str
    words: tuple[str, ...] = ()


def lines(name: str, change: Callable[[list[str]], list[str]]) -> Damage:
    """A text file whose lines are changed."""

    def damage(folder: Path) -> None:
        changed = change((folder / name).read_text().splitlines())
        (folder / name).write_text("".join(f"{line}\n" for line in changed))

    return damage


def entry(name: str, change: Callable[[dict[str, Any]], Any], line: int = 0) -> Damage:
    """A line that is a JSON object, which `change` changes in place."""

    def edit(found: list[str]) -> list[str]:
        loaded = json.loads(found[line])
        change(loaded)
        return [*found[:line], json.dumps(loaded), *found[line + 1 :]]

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
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def shifted(by: int) -> Damage:
    """Poses that go by the deltas of a neighbour."""

    def change(facts: dict[str, Any]) -> None:
        entries = list(facts["actions"].values())
        yaws = [one["yaw"] for one in entries]
        for i, one in enumerate(entries):
            one["yaw"] = yaws[(i + by) % len(yaws)]

    return entry(GF, change)


def begun(held: str) -> Callable[[list[str]], list[str]]:
    """A log of events that begins with what is held then."""
    return lambda found: [found[0], f'1,START,"{held}"', *found[1:]]


LOG, VPT, GF, OWL = "one/input.csv", "player-20220102", "metadata/seed_1_part_1.json", "one/inputs.csv"
INFO, DATA, ABOUT = "meta/info.json", "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
SCREEN = "videos/observation.images.screen/chunk-000/file-000.mp4"
FROM = "videos/observation.images.screen/from_timestamp"

FAULTS = {
    "a picture left out": Fault("frames", gone("one/frames/shot-00007.png"), "frame 7 has no picture"),
    "a picture cut off": Fault("frames", half("one/frames/shot-00007.png"), "shot-00007.png .*truncated"),
    "a row of no picture": Fault("frames", lines(LOG, lambda r: [*r, "w,101.55,31"]), "no picture of frame 31"),
    "a key of no use": Fault("frames", lines(LOG, lambda r: [r[0], "q,100,1", *r[1:]]), "line 2: 'q' holds no key"),
    "rows out of order": Fault("frames", lines(LOG, lambda r: [r[0], *r[:0:-1]]), "line .* must ascend"),
    "a word for a time": Fault("frames", lines(LOG, lambda r: [r[0], "w,x,1", *r[1:]]), "line 2: time is 'x'"),
    "a log that drifts": Fault("frames", None, "line .* at 22 fps; set game.fps", ("game.fps=22",)),
    "other columns": Fault("frames", lines(LOG, lambda r: ["key,frame,time", *r[1:]]), "line 1: time is 'frame'"),
    "a mouse that is not there": Fault("frames", None, "hold no mouse", ("game.action_space.mouse=true",)),
    "a line left out": Fault("vpt", lines(f"{VPT}.jsonl", lambda r: r[2:]), "28 rows, .*mp4 has 30 frames"),
    "a damaged line": Fault("vpt", lines(f"{VPT}.jsonl", lambda r: [*r[:4], "{", *r[5:]]), "line 5 is not valid JSON"),
    "a line without mouse": Fault("vpt", entry(f"{VPT}.jsonl", lambda r: r.pop("mouse"), 3), "line 4 lacks mouse"),
    "ticks out of order": Fault("vpt", lines(f"{VPT}.jsonl", lambda r: r[::-1]), "line 2: tick 28 after 29"),
    "keys not dropped": Fault(
        "vpt", None, "line .*'mouse_right' holds no key", ("game.inputs.others=refuse", "game.inputs.keys.use=[]")
    ),
    "a mistyped input": Fault("vpt", None, "no input 'spacebar', but .*space", ("game.inputs.keys.jump=[spacebar]",)),
    "keys not bound": Fault("vpt", None, "inputs.keys must name all", ("game.action_space={keys: [dig], caps: []}",)),
    "another rate": Fault("vpt", None, "mp4 runs at 20 fps, the game .* at 30", ("game.fps=30",)),
    "a video cut off": Fault("vpt", half(f"{VPT}.mp4"), "mp4 .*truncated"),
    "half a button": Fault(
        "vpt", entry(f"{VPT}.jsonl", lambda r: r["mouse"].update(buttons=[1.0]), 3), "line 4: buttons .*1.0"
    ),
    "a video alone": Fault("vpt", gone(f"{VPT}.jsonl"), f"{VPT}.mp4: a recording needs one video and one log"),
    "an entry left out": Fault("gf_minecraft", entry(GF, lambda r: r["actions"].pop("7")), "29 entries, but no"),
    "an entry too few": Fault("gf_minecraft", entry(GF, lambda r: r["actions"].pop("29")), "29 entries, .* 30"),
    "an unknown choice": Fault("gf_minecraft", entry(GF, lambda r: r["actions"]["5"].update(ws=3)), "entry 5: ws must"),
    "a turn beyond float32": Fault(
        "gf_minecraft", entry(GF, lambda r: r["actions"]["5"].update(yaw_delta=1e300)), r"entry 5: yaw_delta is 1e\+300"
    ),
    "a turn of 450 degrees a frame and more": Fault(
        "gf_minecraft", entry(GF, lambda r: r["actions"]["5"].update(yaw_delta=300)), "entry 5: yaw turns by 4500 degre"
    ),
    "pixels beyond float32": Fault(
        "vpt", entry(f"{VPT}.jsonl", lambda r: r["mouse"].update(dy=-1e39), 3), r"line 4: mouse.dy is -1e\+39"
    ),
    "a unit of no degrees": Fault("csgo", None, "unit_deg=1e-40 overflow", ("game.action_space.mouse_unit_deg=1e-40",)),
    "a pixel of too many degrees": Fault("csgo", None, "frame_0_y: yaw turns by", ("game.inputs.yaw_deg=1e30",)),
    "a delta left out": Fault("gf_minecraft", entry(GF, lambda r: r["actions"]["5"].pop("yaw_delta")), "5 .*yaw_d"),
    "actions a frame late": Fault("gf_minecraft", shifted(1), "shifted: .* entry after in 100%"),
    "actions a frame early": Fault("gf_minecraft", shifted(-1), "shifted: .* entry before in 100%"),
    "HDF5 cut off": Fault("csgo", half("hdf5_dm_july2021_1.hdf5"), "truncated or no HDF5"),
    "a frame left out": Fault("csgo", array("frame_9_x", None), "29 pictures, but no frame_9_x"),
    "two bins": Fault("csgo", array("frame_9_y", np.eye(51)[[20, 30, 44]].sum(axis=0)), "9_y must be .*one bin"),
    "a short row": Fault("csgo", array("frame_9_y", np.zeros(50)), "frame_9_y has the shape"),
    "text for numbers": Fault("csgo", array("frame_9_y", "cos\nsystem"), "frame_9_y is .* no numbers"),
    "a smaller picture": Fault("csgo", array("frame_9_x", np.zeros((8, 8, 3), np.uint8)), "frame_9_x has another size"),
    "a picture that is none": Fault("csgo", array("frame_9_x", np.zeros((8, 8))), "frame_9_x is float64"),
    "another rate than 16": Fault("csgo", None, "16 fps, .*'csgo' has 20", ("game.fps=20",)),
    "a mouse without scale": Fault("csgo", None, "set game.inputs.pitch_deg", ("game.inputs.yaw_deg=0",)),
    "a row left out": Fault("lerobot", rows(DATA, lambda r: r[:5] + r[6:]), "episode 0 has 30 rows, .* 31"),
    "an older version": Fault("lerobot", entry(INFO, lambda r: r.update(codebase_version="v2.1")), "of version v2.1"),
    "a path of another kind": Fault("lerobot", entry(INFO, lambda r: r.update(data_path="{x}")), "info.json: the pat"),
    "a component of no use": Fault("lerobot", None, "frame .: 'a' holds no key", ("game.inputs.keys.left=[]",)),
    "half a key": Fault("lerobot", rows(DATA, lambda r: [{**r[0], "action": [0.5] * 6}, *r[1:]]), "frame 0: . is 0.5"),
    "a hole in an action": Fault("lerobot", rows(DATA, lambda r: [{**r[0], "action": [1.0] * 5}, *r[1:]]), "not 6"),
    "pictures between": Fault("lerobot", rows(ABOUT, lambda r: [{**r[0], FROM: 0.026}, *r[1:]]), "should be sh"),
    "pictures left out": Fault("lerobot", rows(ABOUT, lambda r: [{**r[0], FROM: 2.0}, *r[1:]]), "truncated"),
    "another camera": Fault("lerobot", None, "there are: observation.images.screen", ("game.inputs.camera=front",)),
    "mistyped axes": Fault("lerobot", None, "axes must name", ("game.inputs.axes=[look_up,look_right]",)),
    "no time of a video": Fault(
        "lerobot", rows(ABOUT, lambda r: [{k: one[k] for k in one if k != FROM} for one in r]), f"row 0 has no .*{FROM}"
    ),
    "a dataset's video cut off": Fault("lerobot", half(SCREEN), "file-000.mp4 .*truncated"),
    "a parquet cut off": Fault("lerobot", half(DATA), "cannot read .*file-000.parquet"),
    "events out of order": Fault(
        "owl_control", lines(OWL, lambda r: [*r[:6], "1759999998.9,END,", *r[6:]]), "line 7: its time is 1.6"
    ),
    "arguments left out": Fault("owl_control", lines(OWL, lambda r: [r[0], "1,KEYBOARD,[87]", *r[1:]]), "line 2: KEYB"),
    "a cell too few": Fault("owl_control", lines(OWL, lambda r: [*r[:3], "1760000000.5,FOCUS"]), "line 4: 2 cells"),
    "no list of keys": Fault("owl_control", lines(OWL, begun('{""keyboard"": null}')), "line 2: START has .*None"),
    "keys that are no numbers": Fault("owl_control", lines(OWL, begun('{""mouse"": [[1]]}')), "line 2: START has .*1"),
    "no beginning": Fault("owl_control", lines(OWL, lambda r: [i for i in r if "START" not in i]), "no VIDEO_START"),
    "a log that goes on": Fault("owl_control", lines(OWL, lambda r: [*r[:-2], "1760000009,VIDEO_END,[]"]), "7.8 s be"),
    "no video": Fault("owl_control", gone("one/recording.mp4"), "needs one video and one log"),
    "a state that is none": Fault("owl_control", lines(OWL, lambda r: [*r, "1,KEYBOARD,[87,2]"]), "has the ar"),
    "a kind that is damaged": Fault("owl_control", lines(OWL, lambda r: [*r, "1,KEY\x01,[]"]), "line .* is damaged"),
    "a comma in a number": Fault("owl_control", lines(OWL, lambda r: [*r, "17,5,END,[]"]), "line .* event_type is '5'"),
    "a time that is none": Fault("owl_control", lines(OWL, lambda r: [r[0], "1e300,END,", *r[1:]]), "line 2: time"),
    "a move beyond sense": Fault(
        "owl_control", lines(OWL, lambda r: [*r[:3], '1760000000.5,MOUSE_MOVE,"[1e300, 0]"', *r[3:]]), "line 4: .*1e"
    ),
    "a move beyond any number": Fault(
        "owl_control", lines(OWL, lambda r: [*r[:3], f"1760000000.5,MOUSE_MOVE,[{10**400}, 0]", *r[3:]]), "inputs.csv"
    ),
    "no log": Fault("event_log", gone("two.jsonl"), "two.mp4: a recording needs one video and one log"),
    "a word of no kind": Fault(
        "event_log", entry("two.jsonl", lambda r: r.update(what="Wheel")), "line 1: what is 'Wheel'; say in game.inputs"
    ),
    "a move beyond float32": Fault("event_log", lines("one.csv", lambda r: [*r, "900,motion,,1e39,0"]), ": x (of|is)"),
    "a move that is no number": Fault("event_log", lines("one.csv", lambda r: [*r, "900,motion,,0,nan"]), ": y is"),
    "a row without a time": Fault("event_log", entry("two.jsonl", lambda r: r.update(t=None), 2), "line 3: t is None"),
    "a row of a cell more": Fault("event_log", lines("one.csv", lambda r: [*r, "9,motion,,0,0,0"]), "line .*: 6 cells"),
    "a press of nothing": Fault("event_log", lines("one.csv", lambda r: [*r, "9,KeyDown,,,"]), "line .* names neither"),
    "a key of no binding": Fault("event_log", lines("one.csv", lambda r: [*r, "650,KeyDown,q,,"]), "'q' holds"),
    "a log of seconds": Fault("event_log", None, "csv lasts 0.0006.*time_unit", ("game.inputs.time_unit=us",)),
    "a log of another time": Fault("event_log", None, "nothing happened while", ("game.inputs.offset_s=-1760000000",)),
    "a column that is not there": Fault("event_log", None, "no column 'ms'", ("game.inputs.columns.time=ms",)),
    "a role that is none": Fault("event_log", None, "columns has no 'tme'; there", ("game.inputs.columns={tme: t}",)),
    "no start": Fault("event_log", None, "csv has no .*kinds.start .rec", ("game.inputs.kinds.start=[rec]",)),
    "a word of two kinds": Fault(
        "event_log", None, "both press and release", ("game.inputs.kinds={press: [a], release: [A]}",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_names_what_is_wrong(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    fault, folder = FAULTS[name], tmp_path / "source"
    shutil.copytree(sources[fault.reader], folder)
    if fault.damage:
        fault.damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=fault.said) as error:
        for episode in read_all(fault.reader, folder, load_game(fault.reader, tmp_path, *fault.words)):
            list(episode.frames())
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value) or "game.inputs" in str(error.value) or "inputs.keys" in str(error.value)


def test_encode_stops_before_it_writes_with_one_line_and_status_2(sources, codec_folder, tmp_path, capsys):
    folder = tmp_path / "source"
    shutil.copytree(sources["vpt"], folder)
    lines(f"{VPT}.jsonl", lambda found: found[:-2])(folder)
    paths = [f"source={folder}", f"codec={codec_folder}", f"out={tmp_path}/out"]
    assert run("data_pipeline", VERBS, ["encode", *words("vpt", tmp_path), *paths, "heldout_every=0"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "28 rows" in said and f"{folder}/{VPT}.jsonl" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("reader", "module"), [("csgo", "h5py"), ("lerobot", "pyarrow.parquet")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(reader, module, sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"need {module.split('.')[0]}: pip install 'worldloom\[readers\]'"):
        read_all(reader, sources[reader], load_game(reader, tmp_path))


def test_a_server_that_refuses_a_table_has_not_sent_a_damaged_one(sources, tmp_path, monkeypatch):
    (first, *_), game = find_recordings("lerobot", sources["lerobot"]), load_game("lerobot", tmp_path)

    def refuse(path: Path) -> None:
        raise RefusedError(f"{path}: the server refuses")

    monkeypatch.setattr(storage, "open", refuse)
    lerobot._kept_table.cache_clear()
    with pytest.raises(RefusedError):
        first.read(game)


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "worldloom"])
def test_a_folder_of_something_else_is_refused(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path / "else")):
        read_all(reader, tmp_path / "else", load_game(reader, tmp_path))
