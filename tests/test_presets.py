"""The released games: their YAML, what `random` draws in them, and what an overlay lights."""

from pathlib import Path

import numpy as np
import pytest

from configs import load_config
from configs.game import ActionSpace
from data_pipeline.overlay import Overlay, active_keys
from data_pipeline.types import Actions
from model.config import ModelConfig
from sampling.scripts import Scripted, random_table, read_script
from tests.parity.upstream import RELEASED, released_game, released_space

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_game_s_file_fits_its_model(name: str) -> None:
    game = released_game(name)
    assert (game.name, game.height, game.width) == (name, 352, 640)
    model = load_config(ModelConfig, [str(ROOT / "configs" / "models" / f"matrix_game_2_{name}_distilled.yaml")]).model
    assert model.action is not None and model.action.keyboard_dim_in == len(game.action_space.keys)
    assert model.action.enable_mouse == game.action_space.mouse


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
    assert {label for label, active in shown.items() if active[0]} == ({lit} if lit else set())
    assert {"W", "A", "S", "D"} <= shown.keys()


@pytest.mark.parametrize("name", RELEASED)
def test_an_overlay_of_a_released_game_draws_its_caps(name: str) -> None:
    space, frame = released_space(name), np.full((352, 640, 3), 120, np.uint8)
    overlay = Overlay(space, 352, 640)
    assert len(overlay.keys) == (6 if name == "templerun" else 4)
    plays = (actions(space, key) for key in (space.keys[1], ""))
    held, idle = (overlay.draw(frame, play.keyboard[0], play.mouse[0]) for play in plays)
    assert (held != idle).any() and (idle != frame).any()
