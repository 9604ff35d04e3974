import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from configs.game import ActionSpace
from data_pipeline.types import Actions
from sampling.scripts import Scripted, read_script, script_words

DOOM = ActionSpace("doom", ("forward", "back", "left", "right"), ("W", "S", "A", "D"), mouse_unit_deg=3.0)
DRIVE = ActionSpace("drive", ("forward", "back"), mouse_unit_deg=1.0)
RUNNER = ActionSpace("runner", ("jump", "slide", "turn_left", "turn_right"), mouse=False)


def same(one: Actions, other: Actions) -> bool:
    return np.array_equal(one.keyboard, other.keyboard) and np.array_equal(one.mouse, other.mouse)


def held(action_space: ActionSpace, actions: Actions, row: int) -> set[str]:
    return {key for key, value in zip(action_space.keys, actions.keyboard[row], strict=True) if value}


@pytest.mark.parametrize("key", DOOM.keys)
def test_a_key_s_name_holds_that_key_alone(key: str) -> None:
    actions = read_script(key, DOOM, Scripted(30))
    assert actions.keyboard.shape == (30, 4) and actions.mouse.shape == (30, 2)
    assert all(held(DOOM, actions, row) == {key} for row in range(30)) and not actions.mouse.any()


@pytest.mark.parametrize(
    ("word", "pitch_yaw_deg"),
    [("turn_left", (0, -6)), ("turn_right", (0, 6)), ("look_up", (6, 0)), ("look_down", (-6, 0)), ("idle", (0, 0))],
)
def test_a_turn_is_given_in_degrees_and_stored_in_units(word: str, pitch_yaw_deg: Sequence[float]) -> None:
    actions = read_script(word, DOOM, Scripted(5, mouse_deg=6))
    assert not actions.keyboard.any()
    assert actions.mouse[0] == pytest.approx(np.array(pitch_yaw_deg) / DOOM.mouse_unit_deg)


def test_words_joined_with_plus_act_together() -> None:
    actions = read_script("forward+left+turn_left", DOOM, Scripted(3))
    assert held(DOOM, actions, 2) == {"forward", "left"} and actions.mouse[2].tolist() == [0, -1]


def test_segments_follow_each_other_and_begin_again_until_the_frames_are_filled() -> None:
    actions = read_script("forward:3,turn_left:2", DOOM, Scripted(9))
    assert actions.keyboard[:, 0].tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0]
    assert actions.mouse[:, 1].tolist() == [0, 0, 0, -1, -1, 0, 0, 0, -1]


@pytest.mark.parametrize("count", ["9", "1000000000000", "9" * 5000, "00000000000000000000009"])
def test_a_segment_lasts_no_longer_than_the_frames(count: str) -> None:
    assert same(
        read_script(f"forward:{count},back:{count}", DOOM, Scripted(9)), read_script("forward", DOOM, Scripted(9))
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 0}, "frames=0 must be 1 to 1000000"),
        ({"frames": 10**20}, "must be 1 to 1000000"),
        ({"mouse_deg": float("nan")}, "mouse_deg=nan must be -3600 to 3600"),
        ({"mouse_deg": float("-inf")}, "mouse_deg=-inf"),
        ({"mouse_deg": 1e300}, "mouse_deg=1e\\+300"),
    ],
)
def test_settings_beyond_sense_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Scripted(**{"frames": 9, **settings})  # type: ignore[arg-type]


def test_a_json_list_says_the_same_as_words(tmp_path: Path) -> None:
    path = tmp_path / "walk.json"
    path.write_text(json.dumps(["forward:3", "back+turn_left:2"]))
    assert same(read_script(str(path), DOOM, Scripted(9)), read_script("forward:3,back+turn_left:2", DOOM, Scripted(9)))


def test_a_recording_s_actions_are_a_script(tmp_path: Path) -> None:
    path = tmp_path / "actions.csv"
    path.write_text("frame,forward,back,left,right,pitch_deg,yaw_deg\n0,1,0,0,0,0,1.5\n1,0,0,0,1,-3,0\n2,0,0,0,0,0,0\n")
    actions = read_script(str(path), DOOM, Scripted(2))
    assert held(DOOM, actions, 0) == {"forward"} and held(DOOM, actions, 1) == {"right"}
    assert actions.mouse.tolist() == [[0, 0.5], [-1, 0]]
    with pytest.raises(ValueError, match=r"3 rows for 4 frames"):
        read_script(str(path), DOOM, Scripted(4))


@pytest.mark.parametrize("action_space", [DOOM, DRIVE, RUNNER], ids=lambda space: space.name)
def test_chance_is_decided_by_the_seed_alone(action_space: ActionSpace) -> None:
    one, again, other = (read_script("random", action_space, Scripted(81, seed)) for seed in (3, 3, 4))
    assert same(one, again) and not same(one, other)
    longer = read_script("random", action_space, Scripted(200, 3))
    assert same(longer[:81], one)


@pytest.mark.parametrize("action_space", [DOOM, DRIVE, RUNNER], ids=lambda space: space.name)
def test_chance_holds_each_entry_for_twelve_frames_after_the_first_one(action_space: ActionSpace) -> None:
    actions = read_script("random", action_space, Scripted(240, 0))
    rows = np.concatenate([actions.keyboard, actions.mouse], axis=1)
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    assert len(changes) > 8 and (changes % 12 == 1).all()


def test_chance_presses_everything_and_forward_most_and_never_both_ways_at_once() -> None:
    actions = read_script("random", DOOM, Scripted(12 * 400, 0))
    share = dict(zip(DOOM.keys, actions.keyboard.mean(axis=0), strict=True))
    assert min(share.values()) > 0.02 and max(share, key=lambda key: share[key]) == "forward"
    both = actions.keyboard[:, 0] * actions.keyboard[:, 1] + actions.keyboard[:, 2] * actions.keyboard[:, 3]
    assert not both.any()
    assert (actions.mouse[:, 1] > 0).mean() == pytest.approx((actions.mouse[:, 1] < 0).mean(), abs=0.1)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("foward", "did you mean 'forward'"),
        ("forward+turnleft", "did you mean 'turn_left'"),
        ("rnadom", "did you mean 'random'"),
        ("xyzzy", "forward, back, left, right"),
        ("forward:soon", "number of frames"),
        ("forward:0", "number of frames"),
        ("forward:٠", "number of frames"),
        ("forward:1000000000000,bakc", "did you mean 'back'"),
        ("damaged.json", "damaged.json is not valid JSON"),
        ("deep.json", "deep.json is not valid JSON"),
        ("latin.json", "latin.json is not valid JSON"),
        ("empty.json", "must hold a list of segments"),
        ("", "no key or preset ''"),
        ("nowhere.csv", "nowhere.csv"),
        ("nowhere.json", "nowhere.json"),
    ],
)
def test_a_script_that_cannot_be_read_is_one_clear_line(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"damaged.json": b'["forw', "deep.json": b"[" * 200_000, "latin.json": b'["\xe9"]', "empty.json": b"[]"}
    for name, text in files.items():
        Path(name).write_bytes(text)
    with pytest.raises((ValueError, OSError)) as error:
        read_script(script, DOOM, Scripted(9))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_action_space_without_a_mouse_has_no_mouse_presets_and_no_mouse_columns() -> None:
    assert set(script_words(RUNNER)) == {"idle", *RUNNER.keys}
    assert read_script("turn_left", RUNNER, Scripted(4)).mouse.shape == (4, 0)
