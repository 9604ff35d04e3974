"""`generate` with models of both kinds, and what it loads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_released import TOWER, TOWER_STATE
from tiny_world import DIT, GAME, SPACE, generate, random_video, write_causal, write_checkpoint
from torch import Tensor

from configs.errors import UserError
from configs.game import ActionSpace
from data_pipeline.video import frame_times, probe, read_frames, to_uint8, to_video, write_video
from model.action_dit import ActionDiT
from model.vision import load_tower
from model.world import WorldModel, check_same_game, load_world, newest_checkpoint
from sampling.denoising import Denoising, Rows, Velocity, cfg
from sampling.generate import GenerateConfig
from sampling.generate import generate as generate_config
from sampling.play import play as play_world
from sampling.scripts import Scripted, read_script


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of a chunked model."""
    return write_checkpoint(tmp_path_factory.mktemp("run")).parent


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal(tmp_path_factory.mktemp("causal"))


def play(world: WorldModel, chunks: int) -> Tensor:
    """Frames (b n h w 3) of random play from one picture."""
    actions = read_script("random", SPACE, Scripted(9 * chunks))
    rows = torch.from_numpy(actions.keyboard)[None], torch.from_numpy(actions.mouse)[None]
    return torch.cat(list(play_world(world, random_video(1)[:, :, 0], rows, [0], Denoising(steps=2))), dim=1)


def test_guidance_stretches_what_the_actions_of_the_made_frames_add() -> None:
    actions, seen = (torch.rand(1, 18, 4), torch.randn(1, 18, 2)), list[Rows]()

    def velocity(rows: Rows) -> Velocity:
        seen.append(rows)
        return lambda x, timestep: x * timestep + rows[0].sum() + rows[1].sum()

    x, timestep = torch.randn(2, 3), torch.tensor(0.5)
    guided = cfg(velocity, actions, 9, 2.5)(x, timestep)
    with_actions, without = (velocity(rows)(x, timestep) for rows in seen[:2])
    torch.testing.assert_close(guided, without + 2.5 * (with_actions - without))
    for rows, idle in zip(actions, seen[1], strict=True):
        assert torch.equal(idle[:, :9], rows[:, :9]) and idle.shape == rows.shape and not idle[:, 9:].any()
    seen.clear()
    cfg(velocity, actions, 9, 1.0)
    assert len(seen) == 1 and seen[0] is actions  # no second pass that nobody asked for


@pytest.mark.parametrize("guidance", [0.0, -1.0, float("nan"), float("inf")])
def test_guidance_that_means_nothing_is_refused(guidance: float) -> None:
    with pytest.raises(UserError, match="guidance"):
        Denoising(guidance=guidance)


def test_a_model_with_vision_is_shown_the_first_frame_of_every_context(run: Path) -> None:
    config = replace(DIT, vision="pooled", img_dim=TOWER.hidden_size)
    tower = load_tower(TOWER_STATE, TOWER, "the fixture")
    shown: list[Tensor] = []
    tower.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    dit = ActionDiT(config, torch.Generator().manual_seed(0)).eval()
    made = play(replace(load_world(run), dit=dit, tower=tower), chunks=3)
    assert len(shown) == 3 and torch.equal(shown[0], random_video(1)[:, :, 0])
    for picture, start in zip(shown[1:], (0, 9), strict=True):
        assert torch.equal(picture, to_video(made[:, start : start + 1])[:, :, 0])


def test_bf16_changes_little(run: Path) -> None:
    exact, coarse = (play(load_world(run, precision=precision), chunks=1).float() for precision in ("fp32", "bf16"))
    assert 0 < (exact - coarse).abs().mean() < 8  # of 255; weights and products have 8 bits


def test_frames_survive_the_way_to_video_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3 * 6).reshape(1, 2, 48, 16, 3)
    assert torch.equal(to_uint8(to_video(frames)), frames)


def test_a_run_folder_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    older, newer = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newer
    (newer / "COMPLETE").unlink()
    assert newest_checkpoint(tmp_path) == older
    with pytest.raises(UserError, match="never written to the end"):
        newest_checkpoint(newer)


def test_a_changed_codec_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with open(tmp_path / "codec" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="codec"):
        load_world(folder)


def test_recordings_of_another_action_space_are_refused_by_name() -> None:
    other = replace(GAME, action_space=ActionSpace("kart", ("gas", "brake")))
    with pytest.raises(UserError, match=r"'kart' \(gas, brake.*'tiny' \(forward, back, left, right"):
        check_same_game(GAME, other, "heldout.json")


def test_generate_writes_a_playable_video_and_a_sheet(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "demo.mp4"
    assert generate(run, tmp_path, "actions=forward+turn_left", "frames=20", "steps=2", f"out={out}") == 0
    info = probe(out)
    assert info.width >= 600
    assert frame_times(out).tolist() == pytest.approx([i / 17.5 for i in range(20)])
    assert len(list(read_frames(out))) == 20
    with Image.open(out.with_suffix(".png")) as sheet:
        assert sheet.width > 600
    assert "s per frame" in capsys.readouterr().out


def test_generate_starts_from_any_frame_of_a_video(run: Path, tmp_path: Path) -> None:
    video, out = tmp_path / "play.mp4", tmp_path / "demo.mp4"
    write_video(video, list(to_uint8(random_video(3))[0].numpy()), GAME.fps)
    config = GenerateConfig(checkpoint=str(run), prompt=str(video), out=str(out), frames=9, steps=1, prompt_frame=2)
    generate_config(config)
    assert out.exists()
    out.unlink()
    with pytest.raises(UserError, match="prompt_frame=3"):
        generate_config(replace(config, prompt_frame=3))
    assert not out.exists()


def test_generate_begins_with_a_clip_and_takes_few_steps_of_a_causal_model(
    run: Path, causal: Path, tmp_path: Path
) -> None:
    def frames(checkpoint: Path, *args: str) -> int:
        assert generate(checkpoint, tmp_path, *args) == 0
        return probe(tmp_path / "film.mp4").frames

    assert frames(causal, "frames=21") == 21
    assert frames(causal, "few_steps=[1000,500]", "context_noise=0.1", "frames=20") == 20  # the last block is cut
    write_video(tmp_path / "clip.mp4", (np.full((32, 48, 3), 10 * i, np.uint8) for i in range(10)), 17.5)
    for checkpoint in (run, causal):
        clip = f"prompt={tmp_path}/clip.mp4", "frames=21"
        assert frames(checkpoint, *clip, "prompt_frames=9") == 21
        assert generate(checkpoint, tmp_path, *clip, "prompt_frames=10") == 2


@pytest.mark.parametrize(
    ("kind", "arg", "message"),
    [
        ("run", "prompt=no.png", "no.png"),
        ("run", "prompt=text.png", "text.png"),
        ("run", "prompt=text.mp4", "text.mp4"),
        ("run", "actions=foward", "'forward'"),
        ("run", "actions=kart.csv", "kart.csv"),
        ("run", "checkpoint=nowhere", "nowhere"),
        ("run", "checkpoint=unfinished", "no complete checkpoint"),
        ("run", "out=demo.gif", "demo.gif"),
        ("run", "out=a_folder.mp4", "a_folder.mp4"),
        ("run", "frames=1000000000", "frames"),
        ("run", "steps=1000000000", "steps"),
        ("run", "guidance=1e300", "guidance"),
        ("run", "mouse_deg=1e300", "mouse_deg"),
        ("run", "seed=-1", "seed"),
        ("run", "prompt_frames=1000000000", "prompt_frames"),
        ("run", "prompt_frames=10", "prompt_frames"),
        ("run", "device=cuda", "device=cuda"),
        ("run", "few_steps=[1000,500]", "few_steps"),
        ("run", "context_noise=0.1", "context_noise"),
        ("causal", "few_steps=[2000,1000]", "0 and 1000"),
        ("causal", "few_steps=[100000000000000000]", "0 and 1000"),
        ("causal", "few_steps=[333,666]", "few_steps"),
        ("causal", "prompt_frames=9", "prompt_frames=9"),  # of a picture
    ],
)
def test_bad_input_is_one_line_with_status_2_and_nothing_written(
    kind: str, arg: str, message: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch, capsys
) -> None:
    if arg == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(tmp_path)
    for name in ("text.png", "text.mp4"):
        Path(name).write_text("no picture")
    Path("kart.csv").write_text("frame,gas,brake\n0,1,0\n")
    Path("a_folder.mp4").mkdir()
    Path("unfinished/step_0000001").mkdir(parents=True)
    before = {*tmp_path.iterdir(), tmp_path / "prompt.png"}
    assert generate(request.getfixturevalue(kind), tmp_path, arg) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert set(tmp_path.iterdir()) == before
