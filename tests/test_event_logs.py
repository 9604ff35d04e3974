"""Logs of events as recorders write them: every frame has what was held while it was on the screen."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_games import load_game, read_all
from foreign_recordings import draw_play, owl_rows, write_lines, write_owl

from configs import build
from configs.game import GameConfig
from data_pipeline.readers import event_rows, find_recordings
from data_pipeline.readers.keys import KeyMap
from data_pipeline.types import Episode
from data_pipeline.video import write_video

HEADER = "timestamp,event_type,event_args"
MARKED = '"{"inputs":{"keyboard":[87],"mouse":[]}}"'  # quotes within that are not doubled, as since version 1.1.0


def read_owl(folder: Path, rows: Iterable[str], frames: int = 120, *args: str) -> list[Episode]:
    """The episodes of a video of 60 fps with the log `rows`."""
    write_lines(folder / "one" / "inputs.csv", [HEADER, *rows])
    write_video(folder / "one" / "recording.mp4", np.zeros((frames, 16, 16, 3), np.uint8), 60.0)
    return read_all("owl_control", folder, load_game("owl_control", folder, *args))


def held(episode: Episode, key: int = 0) -> list[int]:
    """The frames in which a key is held, the first of them `forward`."""
    return np.flatnonzero(episode.actions.keyboard[:, key]).tolist()


@pytest.mark.parametrize(
    ("start", "release"),
    [
        (MARKED, "[87,false]"),
        (MARKED, '"[87,false]"'),
        ('"{""inputs"": {""keyboard"": [87], ""mouse"": []}}"', '"[87, false]"'),
        ('{"inputs":{"keyboard":[87],"mouse":[],"pad":""}}', "[87, 0]"),
        ('"{""keyboard"": [87]}"', " [87, false] "),
    ],
)
def test_a_key_held_at_the_start_is_held_to_its_release(start: str, release: str, tmp_path: Path) -> None:
    rows = [f"1000,START,{start}", f"1001,KEYBOARD,{release}", '1002,END,"[]"']
    (episode,) = read_owl(tmp_path, rows)
    assert held(episode) == list(range(60))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        *(([f"1000,START,{nothing}", "1001,KEYBOARD,[87, true]", "1002,END,"], {"one": (120, range(60, 120))})
          for nothing in ('"[]"', "[]", "", '""', "null")),
        *((["1000,START,[]", "1000.1,KEYBOARD,[87,true]", "1000.3,UNFOCUS,[]", f"1000.7,{back},[]", "1002,END,[]"],
           {"one-f000000": (18, range(6, 18)), "one-f000042": (78, [])}) for back in ("FOCUS", "REFOCUS")),
        # Black frames before the hook are left out.
        (["1000,START,[]", "1000,VIDEO_START,[]", "1000.5,KEYBOARD,[87,true]", "1001,HOOK_START,[]", "1002,END,[]"],
         {"one-f000060": (60, range(60))}),
        # Rows may stand up to a second behind their time, and those of one time stay in the order of the file.
        (["1000,START,[]", "1001,KEYBOARD,[87,false]", "1000.5,KEYBOARD,[87,true]", "1002,END,[]"],
         {"one": (120, range(30, 60))}),
        (["1000,START,[]", "1000.5,KEYBOARD,[87,true]", "1000.5,KEYBOARD,[87,false]", "1002,END,[]"],
         {"one": (120, [30])}),
        # What follows the end does not count.
        (["1000,START,[]", "1001,END,[]", "1001.5,KEYBOARD,[87,true]", "1001.2,KEYBOARD,[65,true]"],
         {"one": (60, [])}),
    ],
)  # fmt: skip
def test_frames_have_what_was_held_in_them_and_those_that_were_not_logged_are_left_out(rows, expected, tmp_path):
    episodes = read_owl(tmp_path, rows)
    found = {episode.id: (len(episode.actions), held(episode)) for episode in episodes}
    assert found == {name: (length, list(frames)) for name, (length, frames) in expected.items()}
    assert all(not episode.actions.keyboard[:, 1:].any() for episode in episodes)


def test_kinds_that_do_not_count_are_not_parsed(tmp_path: Path) -> None:
    rows = ["1000,START,[]", '1000.1,GAMEPAD_BUTTON,"[1, true, id 7"}', "x,SCROLL,{", "1002,END,}{"]
    read_owl(tmp_path, rows)
    log = (tmp_path / "one" / "inputs.csv").read_bytes().replace(b"id 7", b"id \xff\x00")
    (tmp_path / "one" / "inputs.csv").write_bytes(log)
    (episode,) = read_all("owl_control", tmp_path, load_game("owl_control", tmp_path))
    assert len(episode.actions) == 120


def test_a_log_without_the_video_s_start_is_said_and_can_be_moved(tmp_path: Path, capsys) -> None:
    rows = ["1000,START,[]", "1001,KEYBOARD,[87,true]", "1002.5,END,[]"]
    (episode,) = read_owl(tmp_path, rows)
    assert "inputs.csv has no VIDEO_START" in capsys.readouterr().err and held(episode)[0] == 60
    (moved,) = read_owl(tmp_path, rows, 120, "game.inputs.offset_s=0.1")
    assert len(moved.actions) == 114 and moved.id == "one-f000006" and held(moved)[0] == 60


def test_a_move_of_the_log_against_the_video_moves_its_events_too(tmp_path: Path) -> None:
    rows = ["999,START,[]", "1000,VIDEO_START,[]", "1001,KEYBOARD,[87,true]", "1003,END,[]"]
    for offset_s, first in ((0.1, 66), (-0.1, 54)):
        (episode,) = read_owl(tmp_path, rows, 180, f"game.inputs.offset_s={offset_s}")
        assert held(episode)[0] == first


def test_recordings_that_are_marked_as_invalid_are_left_out_and_said(tmp_path: Path, capsys) -> None:
    for name in ("good", "bad", "worse", "ugly.invalid"):
        write_owl(tmp_path / name, play := draw_play(4, 5), owl_rows(play))
    write_lines(tmp_path / "bad" / ".invalid", ["too short"])
    write_lines(tmp_path / "worse" / ".server_invalid", [])
    write_lines(tmp_path / "notes" / "read me.txt", [])
    assert [one.name for one in find_recordings("owl_control", tmp_path)] == ["good"]
    said = capsys.readouterr().err
    assert "left out bad, ugly.invalid, worse: marked" in said and said.splitlines()[0].endswith(": notes")
    with pytest.raises(ValueError, match="bad holds no recordings"):
        find_recordings("owl_control", tmp_path / "bad")


START = '1000,START,{"inputs":{"keyboard":[115],"mouse":[]}}'  # F4, which started the recorder


@pytest.mark.parametrize(
    "rows",
    [
        ["1001.9,KEYBOARD,[192,true]", "1001.95,KEYBOARD,[192,false]"],  # ` a tenth before the end
        ["1000.5,KEYBOARD,[116,true]", "1000.6,KEYBOARD,[116,false]"],  # F5, 1.5 s before
        ["1001.2,KEYBOARD,[192,true]"],  # still down at the end
    ],
)
def test_the_key_that_stops_the_recorder_is_passed_over(rows: list[str], tmp_path: Path) -> None:
    (episode,) = read_owl(tmp_path, [START, "1000.1,KEYBOARD,[115,false]", *rows, "1002,END,"])
    assert not episode.actions.keyboard.any()


def test_a_key_that_holds_nothing_and_stops_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 3: 'grave_accent' holds no key"):
        read_owl(tmp_path, [START, "1001.2,KEYBOARD,[192,true]", "1001.3,KEYBOARD,[192,false]", "1002,END,"])


@pytest.mark.parametrize("name", ["w", "W"])
def test_a_bound_key_is_never_dropped_whatever_its_case(name: str, tmp_path: Path) -> None:
    game = load_game("owl_control", tmp_path, "game.inputs.others=drop", f"game.inputs.keys.forward=[{name}]")
    write_owl(tmp_path / "one", play := draw_play(4, 5), owl_rows(play))
    (episode,) = read_all("owl_control", tmp_path, game)
    np.testing.assert_array_equal(episode.actions.keyboard[:, 0], play.keyboard[:, 0])


def test_a_key_that_may_be_either_of_two_is_refused(tmp_path: Path) -> None:
    game = load_game("frames", tmp_path, "game.inputs.keys={forward: [up], back: [UP], left: [], right: []}")
    keys = KeyMap(game, {"up": [0], "UP": [1]}, None)
    assert keys.row(["up"], "x").tolist() == [1, 0, 0, 0] and keys.row(["UP"], "x").tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match=r"^x line 3: 'Up' may be up or UP, which differ; bind it as well$"):
        keys.row(["Up"], "x line 3")


def test_a_log_far_too_long_for_its_video_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(event_rows, "MOST_EVENTS", 100)
    monkeypatch.setattr(event_rows, "MOST_EVENTS_PER_S", 100)
    moves = ["1000.1,MOUSE_MOVE,[1,0]"] * 200
    with pytest.raises(ValueError, match=r"line 167: too many events for 40 frames of .*recording.mp4"):
        read_owl(tmp_path, ["1000,START,[]", *moves, "damaged"], 40)


def test_the_video_is_looked_at_before_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mp4 runs at 60 fps, the game 'own' at 30"):
        read_owl(tmp_path, ["damaged"], 40, "game.fps=30")


def read_log(folder: Path, name: str, rows: Iterable[str], inputs: dict[str, Any], frames: int = 40) -> list[Episode]:
    """The episodes of a video of 20 fps with the log `rows`; a unit of its mouse is 1 degree."""
    write_lines(folder / "in" / name, rows)
    write_video(folder / "in" / "one.mkv", np.zeros((frames, 16, 16, 3), np.uint8), 20.0)
    space = {"name": "own", "keys": list(inputs["keys"])}
    settings = {"name": "own", "fps": 20, "height": 16, "width": 16, "action_space": space}
    game = build(GameConfig, {**settings, "inputs": {"pitch_deg": -1, "yaw_deg": 1, **inputs}})
    return read_all("event_log", folder / "in", game)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_log_may_count_time_in_any_unit_from_any_moment(unit: str, tmp_path: Path) -> None:
    scale = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit]
    happened = {"x": -3, "rec": 0, "down": 0.5, "up": 1}
    rows = [
        json.dumps({"time": (1_760_000_000 + at) * scale, "kind": kind, "key": "W"}) for kind, at in happened.items()
    ]
    inputs = {"keys": {"go": ["w"]}, "time_unit": unit, "kinds": {"start": ["rec"], "ignore": ["x"]}}
    (episode,) = read_log(tmp_path, "one.jsonl", rows, inputs)
    assert held(episode) == list(range(10, 20))


def test_a_log_without_kinds_has_keys_with_a_state_or_moves(tmp_path: Path) -> None:
    rows = ["time,key,button,state,dx,dy", "0.1,KeyW,,True,,", "0.2,,left,1,,", "0.26,,,,3,-2", "0.3,KeyW,,False,,"]
    (episode,) = read_log(tmp_path, "one.csv", rows, {"keys": {"go": ["KeyW"], "fire": ["mouse_left"]}})
    assert held(episode) == [2, 3, 4, 5] and held(episode, 1) == list(range(4, 40))
    assert episode.actions.mouse[5].tolist() == [2, 3] and np.count_nonzero(episode.actions.mouse) == 2


@pytest.mark.parametrize(
    ("name", "rows", "inputs", "expected"),
    [
        # A log that says when it pauses and ends is cut there.
        ("events.csv", ["time,event,key", "0,on,", "0.1,press,a", "0.5,away,", "1,back,", "1.5,off,", "1.9,press,a"],
         {"keys": {"go": ["a"]}, "columns": {"kind": "event"},
          "kinds": {"begin": ["on"], "pause": ["away"], "resume": ["back"], "end": ["off"]}},
         {"in-f000000": (10, [range(2, 10)]), "in-f000020": (10, [[]])}),
        # A blank is the key that types one.
        ("one.jsonl", ['{"time": 0.1, "state": 1, "key": " "}', '{"time": 0.2, "state": 0, "key": "space"}'],
         {"keys": {"jump": ["space"]}}, {"one": (40, [[2, 3]])}),
        # A key is released under the letter that Shift makes of it.
        ("one.csv", ["time,kind,key", "0.1,press,w", "0.2,release,W", "1,press,W", "1.1,release,w"],
         {"keys": {"walk": ["w"], "run": ["W"]}}, {"one": (40, [[2, 3], [20, 21]])}),
    ],
)  # fmt: skip
def test_events_hold_keys(name: str, rows: list[str], inputs: dict[str, Any], expected, tmp_path: Path) -> None:
    for episode in (episodes := read_log(tmp_path, name, rows, inputs)):
        frames, keys = expected[episode.id]
        assert len(episode.actions) == frames
        assert [held(episode, key) for key in range(len(keys))] == [list(key) for key in keys]
    assert {episode.id for episode in episodes} == expected.keys()


def test_a_log_that_ends_long_before_its_video_is_noted(tmp_path: Path, capsys) -> None:
    read_log(tmp_path, "one.csv", ["time,kind,key", "0.1,press,w", "0.2,release,w"], {"keys": {"go": ["w"]}}, 200)
    assert "one.csv ends 9.8 s before" in capsys.readouterr().err
