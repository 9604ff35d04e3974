import numpy as np
import pytest

from configs.game import ActionSpace
from data_pipeline.overlay import Overlay, enlarge, key_boxes
from sampling.video_grid import Tile, draw_sheet

DOOM = ActionSpace("doom", ("forward", "back", "left", "right"), ("W", "S", "A", "D"))
RUNNER = ActionSpace("runner", ("jump", "slide", "turn_left", "turn_right"), mouse=False)
GREY = np.full((384, 640, 3), 120, np.uint8)


def lit_keys(action_space: ActionSpace, keyboard: list[int]) -> list[bool]:
    """Which keys of the drawn frame are filled white: the brightness just inside each one's upper left corner."""
    overlay = Overlay(action_space, *GREY.shape[:2])
    mouse = np.zeros(2 if action_space.mouse else 0)
    drawn = overlay.draw(GREY, np.array(keyboard, float), mouse)
    spots = [(x + image.width // 2, y + image.height // 4 + 5) for (image, (x, y)), _ in overlay.keys]
    return [bool(drawn[y, x].min() > 240) for x, y in spots]


@pytest.mark.parametrize("keyboard", [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("action_space", [DOOM, RUNNER], ids=lambda space: space.name)
def test_only_the_held_keys_are_lit(action_space: ActionSpace, keyboard: list[int]) -> None:
    assert lit_keys(action_space, keyboard) == [bool(held) for held in keyboard]


def amber_centre(mouse: tuple[float, float]) -> np.ndarray:
    """(down, right) from the dial's centre to the middle of the amber vector, px."""
    overlay = Overlay(DOOM, *GREY.shape[:2])
    drawn = overlay.draw(GREY, np.zeros(4), np.array(mouse, float)).astype(int)
    amber = (drawn[..., 0] - drawn[..., 2]) > 120
    assert amber.any()
    return np.argwhere(amber).mean(axis=0) + 0.5 - np.array(overlay.centre[::-1])


@pytest.mark.parametrize(
    ("mouse", "down_right"), [((0, 3), (0, 1)), ((0, -3), (0, -1)), ((2, 0), (-1, 0)), ((-2, 0), (1, 0))]
)
def test_the_vector_points_where_the_picture_is_turned(mouse: tuple[float, float], down_right: tuple[int, int]) -> None:
    tip = amber_centre(mouse)
    assert np.dot(tip, down_right) > 4 and abs(np.dot(tip, down_right[::-1])) < 1  # px: thin and straight


def test_a_faster_turn_moves_the_vector_further_and_never_out_of_the_dial() -> None:
    slow, fast, absurd = (amber_centre((0, yaw))[1] for yaw in (1, 4, 400))
    assert 0 < slow < fast < absurd < Overlay(DOOM, *GREY.shape[:2]).radius


def test_without_a_mouse_there_is_no_dial_and_the_given_frame_stays_as_it_is() -> None:
    frame = GREY.copy()
    drawn = Overlay(RUNNER, *GREY.shape[:2]).draw(frame, np.ones(4), np.zeros(0))
    assert (drawn[:, 500:] == GREY[:, 500:]).all() and (drawn != GREY).any() and (frame == GREY).all()


def test_no_two_keys_overlap_and_all_are_on_the_picture_even_with_many_keys() -> None:
    labels = ["W", "A", "S", "D", "Space", "Crouch", "Use", "Reload", "Next weapon", "Map"]
    boxes = key_boxes(labels, key_px=35, bottom=365, left=19, right=540)
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= top < bottom <= 365 and 19 <= left < right <= 540
        for other in boxes[:i]:
            assert right <= other[0] or left >= other[2] or bottom <= other[1] or top >= other[3]


def test_a_small_picture_is_enlarged_by_a_whole_factor_and_a_large_one_is_not() -> None:
    assert enlarge(np.zeros((96, 160, 3), np.uint8)).shape == (384, 640, 3)
    assert enlarge(np.zeros((352, 640, 3), np.uint8)).shape == (352, 640, 3)


def test_a_sheet_shows_every_picture() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
    tiles = [Tile(np.full((96, 160, 3), colour, np.uint8), f"chunk {i}") for i, colour in enumerate(colours)]
    sheet = np.asarray(draw_sheet(tiles, "four", columns=3))
    for colour in colours:
        assert (sheet == colour).all(axis=-1).sum() > 0.9 * 400 * 240
