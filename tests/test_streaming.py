"""Rollouts of a causal model: blocks of frames, caches filled by one call, a world that answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import DIT, random_video, random_world, write_checkpoint
from torch import Tensor

from configs import save_config
from configs.cli import run as run_words
from data_pipeline.types import Actions
from data_pipeline.video import probe, to_uint8, write_video
from model.flow import FlowMatch, FlowMatchConfig
from model.inputs import action_windows, condition
from model.kv_cache import LayerKVCache
from model.masks import CausalConfig
from model.world import WORLD_FILE, WorldModel, read_world_config
from sampling.__main__ import VERBS
from sampling.denoising import Denoising, denoise_in_few_steps, integrate
from sampling.play import LiveWorld
from sampling.play import play as play_world
from sampling.streaming import StreamingRollout

CAUSAL = replace(DIT, causal=CausalConfig(block=3, window=6))
FEW = Denoising(few_steps=(1000, 666, 333))


@pytest.fixture(scope="module")
def world(codec_folder: Path) -> WorldModel:
    return random_world(codec_folder, CausalConfig(block=3, window=6))


def rows(n: int, b: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, n, 4, generator=generator).round(), torch.randn(b, n, 2, generator=generator)


def play(
    world: WorldModel,
    n: int = 33,
    seeds: tuple[int, ...] = (0,),
    denoising: Denoising = Denoising(steps=2),  # noqa: B008
    actions: tuple[Tensor, Tensor] | None = None,
    prompt: Tensor | None = None,
) -> list[Tensor]:
    prompt = random_video(1)[:, :, 0] if prompt is None else prompt
    keyboard, mouse = (one.expand(len(seeds), -1, -1) for one in (rows(n) if actions is None else actions))
    images = prompt.expand(len(seeds), *prompt.shape[1:])
    return list(play_world(world, images, (keyboard, mouse), seeds, denoising))


def test_blocks_see_the_windows_and_conditions_that_a_whole_clip_has(world: WorldModel) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    whole = rows(33)
    handle = world.dit.register_forward_pre_hook(
        lambda module, given, named: (
            seen.append((named["cond"], named["keyboard"], named["mouse"])) if named.get("update_cache") else None
        ),
        with_kwargs=True,
    )
    stream = StreamingRollout(world, random_video(1)[:, :, 0], [0], Denoising(steps=1))
    for block, (first, last) in enumerate([(0, 9), (9, 21), (21, 33)]):
        assert stream.frames_due == last - first
        stream.step(*(one[:, first:last] for one in whole))
        frames = range(3 * block, 3 * block + 3)
        _, *windows = seen[-1]
        for one, window in zip(whole, windows, strict=True):
            assert torch.equal(window, action_windows(one, [4 * i for i in frames], 12))
    handle.remove()
    known = world.codec.encode(random_video(1))
    clip = torch.cat([known, torch.zeros_like(known).expand(-1, -1, 8, -1, -1)], dim=2)
    assert torch.equal(torch.cat([cond for cond, _, _ in seen], dim=2), condition(clip, 1))


def test_a_prompt_clip_fills_the_caches_as_made_blocks_do(world: WorldModel) -> None:
    video, whole = random_video(21), rows(33)
    made = play(world, actions=whole, prompt=video)
    assert torch.equal(torch.cat(made[:2], dim=1), to_uint8(world.codec.decode(world.codec.encode(video))))
    stream, passes = StreamingRollout(world, video, [0], Denoising(steps=2)), []
    hook = world.dit.register_forward_pre_hook(lambda dit, args: passes.append(args))
    for first, last in ((0, 9), (9, 21)):
        stream.step(*(one[:, first:last] for one in whole))
    hook.remove()
    assert stream.cache.position == 6 and len(passes) == 2  # one pass per block: nothing is made
    assert torch.equal(stream.step(whole[0][:, 21:], whole[1][:, 21:]), made[2])
    other = play(world, actions=whole, prompt=random_video(21, seed=1))
    assert not torch.equal(other[2], made[2])


def test_context_noise_changes_what_later_blocks_see_and_the_model_carries_its_own(
    world: WorldModel, codec_folder: Path
) -> None:
    clean, noisy = (play(world, denoising=Denoising(steps=2, context_noise=level)) for level in (0.0, 0.2))
    assert torch.equal(clean[0], noisy[0]) and not torch.equal(clean[1], noisy[1])
    own = random_world(codec_folder, replace(CausalConfig(3, 6), context_noise=0.2))
    assert all(torch.equal(one, other) for one, other in zip(play(own), noisy, strict=True))


@pytest.mark.parametrize("denoising", [Denoising(steps=2, guidance=3.0), replace(FEW, guidance=3.0)])
def test_guidance_reads_the_caches_twice(world: WorldModel, denoising: Denoising) -> None:
    passes = []
    hook = world.dit.register_forward_pre_hook(lambda dit, args, kwargs: passes.append(kwargs), with_kwargs=True)
    play(world, denoising=denoising)
    hook.remove()
    made = len(denoising.few_steps) or denoising.steps
    assert len(passes) == 3 * (2 * made + 1) and sum(one.get("update_cache", False) for one in passes) == 3


def test_unknown_latents_may_be_grey_frames(codec_folder: Path) -> None:
    world = random_world(codec_folder, replace(CausalConfig(3, 6), unknown="grey"))
    stream = StreamingRollout(world, random_video(1)[:, :, 0], [0], Denoising(steps=1))
    grey = torch.cat([random_video(1), torch.zeros(1, 3, 32, 32, 48)], dim=2)
    latents = world.codec.encode(grey)
    blocks = [stream._cond, *(next(stream._conditions) for _ in range(3))]
    assert torch.equal(torch.cat(blocks[:3], dim=2)[:, 4:], latents) and torch.equal(blocks[3], blocks[2])
    assert blocks[0][:, :4, 0].all() and not blocks[0][:, :4, 1:].any() and not blocks[1][:, :4].any()


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_euler_with_the_true_velocity_recovers_the_block_and_holds_what_is_known(steps: int) -> None:
    x0, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    flow = FlowMatch(FlowMatchConfig())
    assert torch.allclose(integrate(lambda x, t: noise - x0, flow, noise, steps), x0, atol=1e-5)
    held = integrate(lambda x, t: torch.zeros_like(x), flow, noise, steps, known=x0[:, :, :1])
    assert torch.equal(held[:, :, :1], x0[:, :, :1]) and torch.equal(held[:, :, 1:], noise[:, :, 1:])


def test_few_steps_stand_at_the_warped_levels_and_noise_anew() -> None:
    x0, *noises = torch.randn(4, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    flow, seen = FlowMatch(FlowMatchConfig()), []

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x, float(timestep)))
        sigma = timestep / 1000
        return (x - x0) / sigma  # the velocity of whichever noise is in x

    found = denoise_in_few_steps(velocity, flow, noises.__getitem__, (1000, 666, 333))
    assert torch.allclose(found, x0, atol=1e-5)
    assert [round(timestep, 4) for _, timestep in seen] == [1000.0, 908.8427, 713.9794]  # facts of the released models
    for (x, timestep), noise in zip(seen, noises, strict=True):
        sigma = timestep / 1000
        assert torch.allclose(x, (1 - sigma) * x0 + sigma * noise, atol=1e-4)


def test_a_long_rollout_holds_no_more_memory_than_a_short_one(world: WorldModel) -> None:
    live = LiveWorld(world, np.zeros((32, 48, 3), np.uint8), denoising=Denoising(few_steps=(1000,)))
    rest = Actions(np.zeros((1, 4), np.float32), np.zeros((1, 2), np.float32))

    def held() -> int:
        stream = live.rollout
        assert isinstance(stream, StreamingRollout)
        caches = [cache for layer in stream.cache.layers for cache in layer if isinstance(cache, LayerKVCache)]
        kept = [*stream._past, *stream._decoder_state, *(x for cache in caches for x in (cache.k, cache.v))]
        return sum(one.nbytes for one in kept)

    live.step(rest)
    live.step(rest)
    after_two = held()
    for _ in range(20):
        live.step(rest)
    assert held() == after_two


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal checkpoint on disk."""
    folder = write_checkpoint(tmp_path_factory.mktemp("causal"))
    save_config(replace(read_world_config(folder), model=CAUSAL, layout="continuous"), folder / WORLD_FILE)
    return folder


def generate(run: Path, tmp_path: Path, *words: str) -> int:
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / "frame.png")
    given = [f"prompt={tmp_path / 'frame.png'}", f"out={tmp_path / 'demo.mp4'}", "frames=21", "steps=1"]
    return run_words("sampling", VERBS, ["generate", str(run), *given, *words])


def test_generate_streams_from_an_image_with_few_steps_and_from_a_clip(run: Path, tmp_path: Path) -> None:
    assert generate(run, tmp_path, "method=streaming") == 0
    assert probe(tmp_path / "demo.mp4").frames == 21 and (tmp_path / "demo.png").exists()
    few = "method=streaming", "few_steps=[1000,500]", "context_noise=0.1", "actions=idle", "frames=20"
    assert generate(run, tmp_path, *few) == 0 and probe(tmp_path / "demo.mp4").frames == 20  # the last block is cut
    clip = tmp_path / "clip.mp4"
    write_video(clip, (np.full((32, 48, 3), 10 * i, np.uint8) for i in range(9)), 17.5)
    assert generate(run, tmp_path, "method=streaming", f"prompt={clip}", "prompt_frames=9") == 0
    assert generate(run, tmp_path, "method=streaming", f"prompt={clip}", "prompt_frames=10") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=chunked"], "use method=streaming"),
        (["method=streaming", "few_steps=[2000,1000]"], "every step must be between 0 and 1000"),
        (["method=streaming", "few_steps=[100000000000000000]"], "every step must be between 0 and 1000"),
        (["method=streaming", "few_steps=[333,666]"], "must descend"),
        (["method=streaming", "prompt_frames=9"], "needs a video"),
    ],
)
def test_a_wrong_request_is_one_line(
    run: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(run, tmp_path, *words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and not (tmp_path / "demo.mp4").exists()


def test_a_model_that_was_not_trained_causally_is_not_streamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(write_checkpoint(tmp_path / "run"), tmp_path, "method=streaming") == 2
    assert "not trained causally" in capsys.readouterr().err
