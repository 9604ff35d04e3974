"""Action scripts: words, files and random play become rows of actions."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.game import ActionSpace
from data_pipeline.types import Actions
from sampling.scripts import Scripted, read_script, script_words

DOOM = ActionSpace("doom", ("forward", "back", "left", "right"), ("W", "S", "A", "D"), mouse_unit_deg=3.0)
DRIVE = ActionSpace("drive", ("forward", "back"), mouse_unit_deg=1.0)
RUNNER = ActionSpace("runner", ("jump", "slide", "turn_left", "turn_right"), mouse=False)


def rows(script: object, scripted: Scripted, action_space: ActionSpace = DOOM) -> list[list[float]]:
    """Keys, then mouse, of every frame of a script."""
    actions = read_script(str(script), action_space, scripted)
    return np.concatenate([actions.keyboard, actions.mouse], axis=1).tolist()


def pressed(actions: Actions, row: int) -> set[str]:
    return {key for key, value in zip(DOOM.keys, actions.keyboard[row], strict=True) if value}


@pytest.mark.parametrize("key", DOOM.keys)
def test_a_key_s_name_holds_that_key_alone(key: str) -> None:
    actions = read_script(key, DOOM, Scripted(30))
    assert actions.keyboard.shape == (30, 4) and actions.mouse.shape == (30, 2)
    assert all(pressed(actions, row) == {key} for row in range(30)) and not actions.mouse.any()


@pytest.mark.parametrize(
    ("word", "pitch_yaw_deg"),
    [("turn_left", (0, -6)), ("turn_right", (0, 6)), ("look_up", (6, 0)), ("look_down", (-6, 0)), ("idle", (0, 0))],
)
def test_a_turn_is_given_in_degrees_and_stored_in_units(word: str, pitch_yaw_deg: Sequence[float]) -> None:
    actions = read_script(word, DOOM, Scripted(5, mouse_deg=6))
    assert not actions.keyboard.any()
    assert actions.mouse[0] == pytest.approx(np.array(pitch_yaw_deg) / DOOM.mouse_unit_deg)


def test_a_game_without_pitch_has_no_word_to_look_up() -> None:
    level = replace(DOOM, pitch=False)
    assert {"turn_left", "turn_right"} == script_words(level).keys() - {"idle", *level.keys}
    with pytest.raises(UserError, match="look_up"):
        read_script("look_up", level, Scripted(5))
    assert level.hash != DOOM.hash and "no pitch" in level.describe()


def test_an_action_space_with_pitch_keeps_the_hash_that_older_shards_hold() -> None:
    assert DOOM.hash == "e1be78cc80c0"


def test_words_joined_with_plus_act_together() -> None:
    actions = read_script("forward+left+turn_left", DOOM, Scripted(3))
    assert pressed(actions, 2) == {"forward", "left"} and actions.mouse[2].tolist() == [0, -1]


def test_segments_follow_each_other_and_begin_again_until_the_frames_are_filled(tmp_path: Path) -> None:
    actions = read_script("forward:3,back+turn_left:2", DOOM, Scripted(9))
    assert actions.keyboard[:, 0].tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0]
    assert actions.mouse[:, 1].tolist() == [0, 0, 0, -1, -1, 0, 0, 0, -1]
    path = tmp_path / "walk.json"
    path.write_text(json.dumps(["forward:3", "back+turn_left:2"]))
    assert rows(path, Scripted(9)) == rows("forward:3,back+turn_left:2", Scripted(9))


@pytest.mark.parametrize("count", ["9", "1000000000000", "9" * 5000, "00000000000000000000009"])
def test_a_segment_lasts_no_longer_than_the_frames(count: str) -> None:
    assert rows(f"forward:{count},back:{count}", Scripted(9)) == rows("forward", Scripted(9))


@pytest.mark.parametrize(
    ("name", "value"),
    [("frames", 0), ("frames", 10**20), ("mouse_deg", float("nan")), ("mouse_deg", -np.inf), ("mouse_deg", 1e300)],
)
def test_settings_beyond_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        Scripted(**{"frames": 9, name: value})  # type: ignore[arg-type]


def test_a_recording_s_actions_are_a_script(tmp_path: Path) -> None:
    path = tmp_path / "actions.csv"
    path.write_text("frame,forward,back,left,right,pitch_deg,yaw_deg\n0,1,0,0,0,0,1.5\n1,0,0,0,1,-3,0\n2,0,0,0,0,0,0\n")
    actions = read_script(str(path), DOOM, Scripted(2))
    assert pressed(actions, 0) == {"forward"} and pressed(actions, 1) == {"right"}
    assert actions.mouse.tolist() == [[0, 0.5], [-1, 0]]
    with pytest.raises(UserError, match="has 3 rows"):
        read_script(str(path), DOOM, Scripted(4))


@pytest.mark.parametrize("action_space", [DOOM, DRIVE, RUNNER], ids=lambda space: space.name)
def test_the_seed_alone_decides_random_play_and_each_draw_holds_for_twelve_frames(action_space: ActionSpace) -> None:
    first, again, other = (rows("random", Scripted(81, seed), action_space) for seed in (3, 3, 4))
    longer = rows("random", Scripted(240, 3), action_space)
    assert first == again == longer[:81] and first != other
    changes = [i for i in range(1, 240) if longer[i] != longer[i - 1]]
    assert len(changes) > 8 and all(i % 12 == 1 for i in changes)  # frame 0 has a draw of its own


def test_chance_presses_everything_and_forward_most_and_never_both_ways_at_once() -> None:
    actions = read_script("random", DOOM, Scripted(12 * 400, 0))
    share = dict(zip(DOOM.keys, actions.keyboard.mean(axis=0), strict=True))
    assert min(share.values()) > 0.02 and max(share, key=lambda key: share[key]) == "forward"
    both = actions.keyboard[:, 0] * actions.keyboard[:, 1] + actions.keyboard[:, 2] * actions.keyboard[:, 3]
    assert not both.any()
    assert (actions.mouse[:, 1] > 0).mean() == pytest.approx((actions.mouse[:, 1] < 0).mean(), abs=0.1)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("foward", "did you mean 'forward'"), ("forward+turnleft", "did you mean 'turn_left'"),
        ("rnadom", "did you mean 'random'"), ("xyzzy", "forward, back, left, right"), ("", "no key or preset ''"),
        ("forward:soon", "number of frames"), ("forward:0", "number of frames"), ("forward:٠", "number of frames"),
        ("forward:1000000000000,bakc", "did you mean 'back'"), ("damaged.json", "damaged.json"),
        ("deep.json", "deep.json"), ("latin.json", "latin.json"), ("empty.json", "empty.json"),
        ("nowhere.csv", "nowhere.csv"), ("nowhere.json", "nowhere.json"),
    ],
)  # fmt: skip
def test_a_script_that_cannot_be_read_is_one_clear_line(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"damaged.json": b'["forw', "deep.json": b"[" * 200_000, "latin.json": b'["\xe9"]', "empty.json": b"[]"}
    for name, text in files.items():
        Path(name).write_bytes(text)
    with pytest.raises((UserError, OSError)) as error:
        read_script(script, DOOM, Scripted(9))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_action_space_without_a_mouse_has_no_mouse_presets_and_no_mouse_columns() -> None:
    assert set(script_words(RUNNER)) == {"idle", *RUNNER.keys}
    assert read_script("turn_left", RUNNER, Scripted(4)).mouse.shape == (4, 0)
