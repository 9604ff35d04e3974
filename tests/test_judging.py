"""What evaluation measures finds the faults that are planted in pictures and in a game that obeys."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_world import GAME, SPACE, random_world
from toy_game import ToyGame, panning, texture, zooming

from configs.game import ActionSpace
from data_pipeline.types import Actions
from model.masks import CausalConfig
from sampling.appearance import LOOKS, correlation, grid_ratio, looks, psnr
from sampling.denoising import Denoising
from sampling.judging import Judge, along_table, drift_table, jackknife_error, without_each
from sampling.motion import AXES, SPAN, all_motions, recorded_spans, span_means, way_of
from sampling.scripts import Scripted, read_script, script_words
from sampling.trajectories import Prompt

RIGHT, DOWN, APART = (AXES.index(axis) for axis in ("right_px", "down_px", "divergence"))
STARTS = 4


def spans_of(frames: np.ndarray) -> np.ndarray:
    return span_means(all_motions(frames[None]))


@pytest.mark.parametrize("step_px", [-3, -1, 1, 3])
def test_the_motion_of_a_panning_picture_has_the_pan_s_sign_and_size(step_px: int) -> None:
    (motion,) = spans_of(panning(step_px))
    assert motion[RIGHT] == pytest.approx(step_px, rel=0.05)
    assert abs(motion[DOWN]) < 0.1 and abs(motion[APART]) < 0.2


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_a_zooming_picture_moves_apart_by_the_zoom_at_its_edges(factor: float) -> None:
    (motion,) = spans_of(zooming(factor))
    assert motion[APART] == pytest.approx((factor - 1) * 80 / 2, rel=0.3) and abs(motion[RIGHT]) < 0.1


def test_spans_are_whole_and_of_one_rollout() -> None:
    motions = np.arange(2 * (2 * SPAN + 3), dtype=np.float32).reshape(2, -1, 1)
    assert span_means(motions)[:, 0].tolist() == [5.5, 17.5, 32.5, 44.5]


@pytest.fixture(scope="module")
def world(codec_folder: Path):
    """A causal world that remembers 24 frames; only its codec and sizes are used."""
    return random_world(codec_folder, CausalConfig(block=3, window=6))


@pytest.fixture
def judge(world) -> Callable[..., Judge]:
    """Makes a judge of the toy game with faults, beside recordings of the game without any."""

    def make(**faults) -> Judge:
        game, prompts = ToyGame(world, Denoising(1), batch=3, seed=5), []
        for i in range(STARTS):
            actions = read_script("random", SPACE, Scripted(121, seed=i))
            frames = game.rollout(texture(GAME.height, GAME.width, seed=i, colours=3), actions)
            prompts.append(Prompt(f"start {i}", frames, actions))
        return Judge(replace(game, **faults), prompts, mouse_deg=3.0)

    return make


COMMANDS = {"turn_left", "turn_right", "look_up", "look_down", "forward", "back", "left", "right"}


def test_a_game_that_obeys_is_obeyed_by_every_command_and_still_with_nothing_pressed(judge) -> None:
    table, shown = judge().held(STARTS, 2)
    assert set(table) == COMMANDS and set(shown) == COMMANDS | {"idle"}
    for command, row in table.items():
        assert row["obeyed"] == 1 and row["still"] < 0.01 and row["spans"] == 2 * STARTS, command
    assert table["turn_left"]["px"] == pytest.approx(1, rel=0.2)
    for command in ("turn_left", "turn_right", "forward", "left", "right"):
        assert table[command]["real"] > 0.8 and table[command]["real_px"] > 0, command
    assert len(shown["idle"]) == STARTS and len(shown["left"]) == 1


def test_a_mirrored_yaw_flips_obedience_to_turns_alone(judge) -> None:
    table, _ = judge(yaw_sign=-1).held(STARTS, 1)
    assert [table[command]["obeyed"] for command in ("turn_left", "turn_right", "left", "forward")] == [0, 0, 1, 1]
    assert table["turn_left"]["px"] < 0 < table["turn_left"]["real_px"]
    assert judge(yaw_sign=-1).long_run(2, 10.0)["turns"]["obeyed"] == 0


def test_a_long_run_of_a_game_that_obeys_turns_as_it_is_told(judge) -> None:
    table = judge().long_run(2, 10.0)
    assert table["turns"]["obeyed"] == 1 and table["turns"]["spans"] == 2 * (175 // 2 // SPAN)
    assert table["ratio"]["brightness"] == pytest.approx(1, abs=0.1)
    assert {len(values) for values in table["by_second"].values()} == {10}


def grey_fade(picture: np.ndarray, frame: int) -> np.ndarray:
    return cv2.addWeighted(picture, 1 - frame / 350, np.full_like(picture, 128), frame / 350, 0)


def darken(picture: np.ndarray, frame: int) -> np.ndarray:
    return (picture * (1 - frame / 350)).astype(np.uint8)


@pytest.mark.parametrize(("fault", "fallen"), [(grey_fade, {"sharpness", "colourfulness"}), (darken, set(LOOKS))])
def test_a_long_run_that_fades_is_found(judge, fault: Callable, fallen: set[str]) -> None:
    plain, faded = (judge(**faults).long_run(2, 10.0)["ratio"] for faults in ({}, {"fault": fault}))
    assert {name for name in LOOKS if faded[name] < 0.8 * plain[name]} == fallen


def test_a_place_that_is_still_there_is_found_again_and_one_that_is_not_is_not(judge) -> None:
    obeying, forgetful = judge(), judge(yaw_sign=1, fault=lambda picture, frame: np.roll(picture, frame // 3, axis=1))
    idle = obeying.held(STARTS, 2)[1]["idle"]
    kept, lost = obeying.away_and_back(STARTS, idle), forgetful.away_and_back(STARTS, idle)
    assert (kept["degrees"], kept["frames"]) == (30, 20)  # of 24 that it remembers
    likeness = kept["likeness"]
    assert likeness["returned"] == likeness["idle"] == {"psnr_db": 99.0, "correlation": pytest.approx(1)}
    for other in ("codec", "away", "another rollout"):
        assert likeness[other]["psnr_db"] < 40, other
    assert likeness["away"]["correlation"] < 0.5 and likeness["another rollout"]["correlation"] < 0.5
    assert lost["likeness"]["returned"]["correlation"] < 0.7


def test_no_turn_is_longer_than_what_a_model_remembers(world, judge, codec_folder) -> None:
    obeying = judge()
    short = replace(obeying, player=replace(obeying.player, world=random_world(codec_folder)))  # chunk after chunk
    idle = obeying.held(1, 1)[1]["idle"]
    table = short.away_and_back(1, idle)
    assert table["frames"] == 16 and "another rollout" not in table["likeness"]


def mosaic(picture: np.ndarray, frame: int = 0) -> np.ndarray:
    small = cv2.resize(picture, None, fx=1 / 16, fy=1 / 16, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def blur(picture: np.ndarray, frame: int = 0) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), 6)


def test_what_is_real_has_the_figures_of_real_play(judge) -> None:
    table, frames = judge().along_recorded(STARTS, (3, 9))
    assert np.array_equal(frames["generated"], frames["real"])
    assert table["grid_px"] == [16, 16] and len(table["psnr_db"]["hold"]["by_frame"]) == 9
    for frame in ("3", "9"):
        row = table["at_frames"][frame]
        assert row["generated"] == {"psnr_db": 99.0, **row["real"]} and row["real"]["grid"] == pytest.approx(1, abs=0.2)
        assert row["above_hold_db"] == pytest.approx(99 - row["hold"]["psnr_db"]) and row["standard_error_db"] > 0
        assert row["codec"]["psnr_db"] < 99


def test_blocks_of_the_model_s_patch_raise_the_grid_ratio_and_blur_lowers_the_sharpness(judge) -> None:
    real = judge().along_recorded(STARTS, (9,))[0]["at_frames"]["9"]
    rows = {fault: judge(fault=fault).along_recorded(STARTS, (9,))[0]["at_frames"]["9"] for fault in (mosaic, blur)}
    assert rows[mosaic]["generated"]["grid"] > 100 and rows[mosaic]["grid_over_codec"] > 10
    assert rows[blur]["generated"]["grid"] == pytest.approx(1, abs=0.5)
    assert rows[blur]["sharpness_over_codec"] < 0.5 * real["sharpness_over_codec"]
    assert max(row["above_hold_db"] for row in rows.values()) < real["above_hold_db"] - 10


def test_an_episode_that_stands_still_does_not_decide_the_gain_over_holding() -> None:
    rng = np.random.default_rng(0)
    real = rng.integers(60, 190, (8, 3, 32, 48, 3)).astype(np.uint8)
    generated = (real + rng.integers(-9, 10, real.shape)).astype(np.uint8)
    frames = {"real": real, "codec": generated, "generated": generated}
    moving = along_table(frames, (2,), (16, 16))["at_frames"]["2"]
    real[0], frames["generated"][0] = real[0, 0], generated[0, 0]
    still = along_table(frames, (2,), (16, 16))["at_frames"]["2"]
    assert still["above_hold_db"] == pytest.approx(moving["above_hold_db"], abs=0.7) and moving["above_hold_db"] > 15
    assert still["standard_error_db"] < 1


def test_the_jackknife_finds_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert jackknife_error(without_each(values)) == pytest.approx(values.std(ddof=1) / np.sqrt(20))


def test_a_grid_is_seen_on_the_right_lines_alone() -> None:
    picture = texture(96, 160)[None]
    blocks = np.stack([mosaic(picture[0])])
    shifted = np.roll(blocks, 4, axis=(1, 2))
    assert grid_ratio(picture, (16, 16)) == pytest.approx(1, abs=0.2)
    assert grid_ratio(blocks, (16, 16)) > 100 and grid_ratio(shifted, (16, 16)) < 0.01
    assert grid_ratio(blocks, (16, 8)) < grid_ratio(blocks, (16, 16))


def test_psnr_and_correlation_of_known_errors() -> None:
    frames = texture(32, 48)[None] // 2
    assert psnr(frames, frames + 10) == pytest.approx(20 * np.log10(255 / 10))
    assert (psnr(frames, frames) == 99).all()
    made = np.concatenate([frames + 10, 255 - frames, np.zeros_like(frames)])
    assert correlation(made, frames.repeat(3, axis=0)) == pytest.approx([1, -1, 0])


def test_looks_of_pictures_made_by_hand() -> None:
    slope = np.repeat(np.tile(np.arange(0, 96, 2, dtype=np.uint8), (32, 1))[..., None], 3, axis=2)
    red = np.zeros((32, 48, 3), np.uint8)
    red[..., 0] = 200
    sharpness, brightness, colour = looks(np.stack([slope, red])).T
    assert sharpness == pytest.approx([2, 0]) and brightness == pytest.approx([47, 60], abs=0.5)
    assert colour == pytest.approx([0, 0.3 * np.hypot(200, 100)])  # no spread, the mean alone


def test_drift_compares_the_first_ten_seconds_with_the_last() -> None:
    seen = np.ones((2, 600, 3))
    seen[:, 300:] = [0.5, 1, 2]
    table = drift_table(seen, fps=10.0)
    assert list(table["ratio"].values()) == [0.5, 1, 2] and len(table["by_second"]["sharpness"]) == 60
    assert drift_table(seen[:, :2], fps=10.0)["ratio"]["sharpness"] == 1


def test_recorded_spans_are_those_of_one_command_alone() -> None:
    rows = 40
    keyboard, mouse = np.zeros((rows, 4), np.float32), np.zeros((rows, 2), np.float32)
    keyboard[:20, 0] = 1  # forward for a span, and for most of one
    keyboard[10:13, 2] = 1  # but not alone: spans of 10 and 7 are left
    mouse[20:32, 1] = -1  # a turn to the left
    mouse[32:, 1] = -0.2  # slower than a turn, and not still
    motions = np.arange(rows - 1, dtype=np.float32)[None, :, None].repeat(3, axis=2)
    found = recorded_spans(motions, [Actions(keyboard, mouse)], SPACE)
    assert {command: spans[:, 0].tolist() for command, spans in found.items()} == {
        "forward": [4.5, 16.0], "turn_left": [25.5],
    }  # fmt: skip


def test_the_way_of_an_unknown_command_is_what_recordings_show_or_is_not_known() -> None:
    right, other = np.full((12, 3), 0.0), np.random.default_rng(0).normal(size=(12, 3))
    right[:, RIGHT] = 1
    assert way_of("turnleft", {"turnleft": right - 0.01}) in ((RIGHT, 1), (DOWN, -1))
    steady = other.copy()
    steady[:, DOWN] = -1
    assert way_of("slide", {"slide": steady}) == (DOWN, -1)
    assert way_of("slide", {"slide": steady[:11]}) is None and way_of("jump", {"jump": other}) is None
    assert way_of("slide", {}) is None and way_of("idle", {"idle": steady}) is None
    assert way_of("forward", {}) == (APART, 1)


def test_every_key_of_a_game_is_a_command() -> None:
    no_mouse = ActionSpace("buttons", ("jump", "left", "right"), mouse=False)
    assert list(script_words(no_mouse)) == ["idle", "jump", "left", "right"]
