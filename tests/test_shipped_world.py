"""The world that comes with the repository: it plays, obeys and does not fade."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.motion import EXPECTED
from data_pipeline.pictures import read_picture
from data_pipeline.video import to_video
from model.world import WorldModel, load_world
from sampling.appearance import looks
from sampling.denoising import Denoising
from sampling.motion import AXES, all_motions, span_means
from sampling.play import play
from sampling.scripts import Scripted, read_script

HALL = Path(__file__).parent.parent / "sampling" / "worlds" / "hall"
FRAMES = 100


@cache
def hall() -> WorldModel:
    return load_world(HALL, precision="bf16")


@cache
def rollouts(script: str, frames: int) -> np.ndarray:
    """Four places under one script: (4 frames h w 3) uint8."""
    world = hall()
    starts = [read_picture(str(path)) for path in sorted((HALL / "starts").glob("*.png"))[:4]]
    image = to_video(torch.from_numpy(np.stack(starts))[:, None])[:, :, 0]
    actions = read_script(script, world.game.action_space, Scripted(frames, 0))
    keyboard, mouse = (torch.from_numpy(rows)[None].expand(4, -1, -1) for rows in (actions.keyboard, actions.mouse))
    return torch.cat(list(play(world, image, (keyboard, mouse), range(4), Denoising(4))), dim=1).numpy()


def test_it_is_small_enough_to_come_with_the_repository() -> None:
    assert sum(path.stat().st_size for path in HALL.rglob("*") if path.is_file()) <= 16_000_000


def spans(script: str) -> np.ndarray:
    """The mean motion (m 3) of 12 frames each, of the first 36."""
    return span_means(all_motions(rollouts(script, 37)))


@pytest.mark.parametrize("command", ["turn_left", "turn_right", "left", "right", "forward", "back"])
def test_a_held_command_moves_the_picture_its_way(command: str) -> None:
    axis, sign = EXPECTED[command]
    assert (sign * spans(command)[:, AXES.index(axis)] > 0).sum() >= 11  # of 12


def test_with_nothing_pressed_it_stands_still() -> None:
    idle, turning = (np.median(np.abs(spans(script)[:, 0])) for script in ("idle", "turn_right"))
    assert idle < 0.1 * turning


def test_a_hundred_frames_do_not_fade() -> None:
    sharpness, brightness, colour = (
        looks(rollouts("random", FRAMES).reshape(-1, 96, 160, 3)).reshape(4, FRAMES, 3).mean(0).T
    )
    for look in (sharpness, brightness, colour):
        assert 0.6 < look[-30:].mean() / look[5:35].mean() < 1.6
