"""The released games: their YAML, what `random` draws in them, and what an overlay lights."""

from pathlib import Path

import numpy as np
import pytest

from configs import load_config
from configs.game import ActionSpace
from data_pipeline.overlay import Overlay, active_keys
from data_pipeline.types import Actions
from model.config import ModelConfig
from sampling.scripts import Scripted, hold, random_table, read_script, script_words
from tests.parity.fixtures import read_fixtures
from tests.parity.upstream import RELEASED, cursor_path, released_game, released_space

ROOT = Path(__file__).parent.parent
(UPSTREAM,) = (one for one in read_fixtures(ROOT / "tests" / "golden") if one.case == "actions")


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_game_s_file_fits_its_model(name: str) -> None:
    found = released_game(name)
    assert (found.name, found.height, found.width) == (name, 352, 640)
    model = load_config(ModelConfig, [str(ROOT / "configs" / "models" / f"matrix_game_2_{name}_distilled.yaml")]).model
    assert model.action is not None and model.action.keyboard_dim_in == len(found.action_space.keys)
    assert model.action.enable_mouse == found.action_space.mouse


@pytest.mark.parametrize("seed", UPSTREAM.meta["seeds"])
@pytest.mark.parametrize("name", RELEASED)
def test_random_in_a_released_game_is_upstream_s_play(name: str, seed: int) -> None:
    expected = UPSTREAM.tensors[f"{name}.seed{seed}.keyboard_condition"].numpy()
    play = read_script("random", released_space(name), Scripted(len(expected), seed))
    assert np.array_equal(play.keyboard, expected)
    mouse = UPSTREAM.tensors.get(f"{name}.seed{seed}.mouse_condition")
    assert np.array_equal(play.mouse, mouse.numpy()) if mouse is not None else play.mouse.shape == (len(expected), 0)


@pytest.mark.parametrize(("name", "entries"), [("universal", 45), ("gta_drive", 12), ("templerun", 7)])
def test_a_table_has_upstream_s_entries(name: str, entries: int) -> None:
    space = released_space(name)
    table = random_table(space)
    assert len(table) == entries
    if name == "templerun":
        assert all(hold(entry, script_words(space), space).keyboard.sum() == 1 for entry in table)


def test_a_turn_of_the_default_speed_is_upstream_s_camera_step() -> None:
    assert script_words(released_space("universal"))["turn_right"].mouse[0].tolist() == [0.0, pytest.approx(0.1)]


def test_another_game_of_the_same_name_has_its_own_table() -> None:
    space = ActionSpace("universal", ("forward", "jump"), mouse=False)
    assert set(random_table(space)) == {"idle+idle", "forward+idle", "jump+idle"}


def test_a_faster_turn_is_asked_for_in_degrees() -> None:
    space = released_space("gta_drive")
    slow, fast = (read_script("random", space, Scripted(200, 1, deg)).mouse for deg in (3, 6))
    assert slow.any() and np.allclose(fast, 2 * slow)


def actions(space: ActionSpace, key: str, yaw: float = 0.0) -> Actions:
    row = np.array([[key == name for name in space.keys]], np.float32)
    return Actions(row, np.array([[0.0, yaw]], np.float32)[:, : 2 * space.mouse])


@pytest.mark.parametrize(
    ("name", "key", "yaw", "lit"),
    [
        ("universal", "left", 0.0, "A"),
        ("gta_drive", "back", 0.0, "S"),
        ("gta_drive", "", -0.1, "A"),
        ("gta_drive", "", 0.1, "D"),
        ("templerun", "jump", 0.0, "W"),
        ("templerun", "turnright", 0.0, "right"),
        ("templerun", "nomove", 0.0, ""),
    ],
)
def test_the_caps_of_a_released_game_light_as_upstream_s(name: str, key: str, yaw: float, lit: str) -> None:
    space = released_space(name)
    shown = active_keys(space, actions(space, key, yaw))
    assert {label for label, one in shown.items() if one[0]} == ({lit} if lit else set())
    assert {"W", "A", "S", "D"} <= shown.keys()


@pytest.mark.parametrize("name", RELEASED)
def test_an_overlay_of_a_released_game_draws_its_caps(name: str) -> None:
    space, frame = released_space(name), np.full((352, 640, 3), 120, np.uint8)
    overlay = Overlay(space, 352, 640)
    assert len(overlay.keys) == (6 if name == "templerun" else 4)
    held, none = (actions(space, key) for key in (space.keys[1], ""))
    one, other = (overlay.draw(frame, play.keyboard[0], play.mouse[0]) for play in (held, none))
    assert (one != other).any() and (other != frame).any()


@pytest.mark.parametrize(
    ("pitch_yaw", "xy"),
    [
        ([(0, 0.1), (0, 0), (0, 0)], [(320, 176)] * 3),
        ([(9, 9), (0, 0.1), (-0.1, 0)], [(320, 176), (320.15, 176), (320.15, 176.6)]),
        ([(1, 1)], [(320, 176)]),
        ([], []),
    ],
)
def test_the_cursor_begins_in_the_middle_whatever_the_first_row_says(pitch_yaw: list, xy: list) -> None:
    mouse = np.array(pitch_yaw, np.float32).reshape(-1, 2)
    assert np.allclose(cursor_path(mouse), np.reshape(xy, (-1, 2)), atol=1e-4)  # float32 of numbers up to 320
