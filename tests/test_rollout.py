"""What holds for rollouts of both kinds of model, and for a few-step model."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_world import SPACE, random_video, random_world
from torch import Tensor

from configs.errors import UserError
from data_pipeline.types import Actions
from data_pipeline.video import to_uint8
from model.masks import CausalConfig
from model.world import WorldModel
from sampling.denoising import Denoising
from sampling.play import LiveWorld, play, start_rollout
from sampling.scripts import Scripted, read_script


class Kind(NamedTuple):
    """A world, how it is played, and the frames of its first three pieces."""

    world: WorldModel
    denoising: Denoising
    pieces: tuple[int, int, int]

    def play(self, script: str = "random", seeds: tuple[int, ...] = (0,), prompt: Tensor | None = None) -> Tensor:
        """The frames (b n h w 3) of three pieces; every sample has the same prompt and script."""
        actions = read_script(script, SPACE, Scripted(sum(self.pieces)))
        rows = [torch.from_numpy(each).expand(len(seeds), -1, -1) for each in (actions.keyboard, actions.mouse)]
        prompt = random_video(1)[:, :, 0] if prompt is None else prompt
        prompts = prompt.expand(len(seeds), *prompt.shape[1:])
        return torch.cat(list(play(self.world, prompts, (rows[0], rows[1]), seeds, self.denoising)), dim=1)


@pytest.fixture(scope="module", params=["chunked", "streaming", "few steps"])
def kind(request, codec_folder) -> Kind:
    few = Denoising(few_steps=(1000, 666, 333)) if request.param == "few steps" else Denoising(steps=2)
    chunked = request.param == "chunked"
    world = random_world(codec_folder, None if chunked else CausalConfig(block=3, window=6))
    return Kind(world, few, (9, 9, 9) if chunked else (9, 12, 12))


def test_a_rollout_yields_each_piece_as_it_is_made_and_cuts_the_last(kind: Kind) -> None:
    rows = torch.zeros(2, sum(kind.pieces) - 4, 4), torch.zeros(2, sum(kind.pieces) - 4, 2)
    prompt = random_video(1)[:, :, 0].expand(2, -1, -1, -1)
    made = list(play(kind.world, prompt, rows, (0, 1), kind.denoising))
    first, second, third = kind.pieces
    assert [piece.shape for piece in made] == [(2, n, 32, 48, 3) for n in (first, second, third - 4)]
    assert all(piece.dtype == torch.uint8 for piece in made)


def test_the_prompt_picture_is_the_first_frame_as_the_codec_shows_it(kind: Kind) -> None:
    prompt = random_video(1)
    shown = to_uint8(kind.world.codec.decode(kind.world.codec.encode(prompt)))
    assert torch.equal(kind.play(prompt=prompt[:, :, 0])[:, 0], shown[:, 0])


def test_a_prompt_clip_comes_first_as_the_codec_shows_it_and_what_follows_depends_on_it(kind: Kind) -> None:
    clip, first = random_video(9), kind.pieces[0]
    made, other = kind.play(prompt=clip), kind.play(prompt=random_video(9, seed=1))
    assert torch.equal(made[:, :first], to_uint8(kind.world.codec.decode(kind.world.codec.encode(clip))))
    assert not torch.equal(made[:, first:], other[:, first:])


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_world(kind: Kind) -> None:
    first, again, other = (kind.play(seeds=(seed,)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch(kind: Kind) -> None:
    alone, among = kind.play(seeds=(5,)), kind.play(seeds=(3, 5, 8))
    difference = (alone[0].int() - among[1].int()).abs()
    # Matrix products of other sizes add in another order; that may turn a rounding, no more.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


def test_actions_after_a_piece_do_not_change_it_and_their_own_piece_they_do(kind: Kind) -> None:
    before = sum(kind.pieces[:2])
    early, late = kind.play(f"idle:{before},forward:12"), kind.play(f"idle:{before},back:12")
    assert torch.equal(early[:, :before], late[:, :before]) and not torch.equal(early[:, before:], late[:, before:])


def test_guidance_leaves_idle_play_alone_and_moves_what_is_held(kind: Kind) -> None:
    guided = kind._replace(denoising=replace(kind.denoising, guidance=3.0))
    assert torch.equal(guided.play("idle"), kind.play("idle"))
    assert not torch.equal(guided.play("turn_left"), kind.play("turn_left"))


def rows(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, n, 4, generator=generator).round(), torch.randn(1, n, 2, generator=generator)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda k, m: (k[:, :8], m), r"keyboard actions of shape \(1, 8, 4\).*\(1, 9, 4\)"),
        (lambda k, m: (k[:, :, :3], m), "keyboard actions"),
        (lambda k, m: (k, m[:, :, :1]), "mouse actions"),
        (lambda k, m: (k, m * float("nan")), "NaN"),
    ],
)
def test_wrong_actions_are_refused_and_change_nothing(kind: Kind, wrong: Any, message: str) -> None:
    rollout, fresh = (start_rollout(kind.world, random_video(1)[:, :, 0], [0], kind.denoising) for _ in range(2))
    with pytest.raises(UserError, match=message) as error:
        rollout.step(*wrong(*rows(9)))
    assert "\n" not in str(error.value) and torch.equal(rollout.step(*rows(9)), fresh.step(*rows(9)))


def test_prompts_that_do_not_fit_are_refused(kind: Kind) -> None:
    for prompt, seeds, message in (
        (random_video(5), [0], "prompt: 5 frames"),
        (torch.zeros(1, 3, 40, 48), [0], "multiples of 16"),
        (random_video(1)[:, :, 0], [0, 1], "2 seeds for 1 pictures"),
    ):
        with pytest.raises(UserError, match=message):
            start_rollout(kind.world, prompt, seeds, kind.denoising)


def test_a_live_world_answers_held_and_single_rows_alike(kind: Kind) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    forward = Actions(np.eye(4, dtype=np.float32)[:1], np.array([[0.0, 1.0]], np.float32))
    live, other = (LiveWorld(kind.world, picture, 3, kind.denoising) for _ in range(2))
    pieces = []
    for n in kind.pieces:
        assert live.frames_due == n
        pieces.append(live.step(forward))
        full = Actions(forward.keyboard.repeat(n, axis=0), forward.mouse.repeat(n, axis=0))
        assert pieces[-1].shape == (n, 32, 48, 3) and np.array_equal(pieces[-1], other.step(full))
    live.restart(picture, seed=3)
    assert np.array_equal(live.step(forward), pieces[0])
