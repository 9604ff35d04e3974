from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_released import TOWER, TOWER_STATE
from tiny_world import DIT, GAME, SPACE, random_video, write_checkpoint
from torch import Tensor, nn

from configs.cli import run as run_words
from configs.errors import UserError
from configs.game import ActionSpace
from data_pipeline.video import probe, read_frames, to_uint8, to_video, write_video
from model.action_dit import ActionDiT
from model.noise import seeded_noise
from model.vision import load_tower
from model.world import WorldModel, check_same_game, load_world, newest_checkpoint
from sampling.__main__ import VERBS
from sampling.chunked import denoise_chunk
from sampling.denoising import Denoising, Rows, Velocity, cfg
from sampling.generate import GenerateConfig
from sampling.generate import generate as generate_config
from sampling.play import play as play_world
from sampling.scripts import Scripted, read_script


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, 100)
    return folder


@pytest.fixture(scope="module")
def world(run: Path) -> WorldModel:
    return load_world(run)


def play(world: WorldModel, chunks: int) -> Tensor:
    """Frames (b n h w 3) of random play from one picture."""
    actions = read_script("random", SPACE, Scripted(9 * chunks))
    rows = torch.from_numpy(actions.keyboard)[None], torch.from_numpy(actions.mouse)[None]
    return torch.cat(list(play_world(world, random_video(1)[:, :, 0], rows, [0], Denoising(steps=2))), dim=1)


def test_known_slots_carry_the_known_latents_at_the_current_noise_level(world: WorldModel) -> None:
    x0 = world.codec.encode(random_video(9, 1))
    noise, seen = seeded_noise((x0.shape[1], 6, *x0.shape[3:]), [0], 1), []

    class Watcher(nn.Module):
        config = DIT

        def forward(self, x: Tensor, timestep: Tensor, cond: Tensor, **actions: Tensor) -> Tensor:
            sigma = timestep[0] / 1000
            seen.append((x[:, :, :3] - (1 - sigma) * x0 - sigma * noise[:, :, :3]).abs().max().item())
            assert torch.equal(cond[:, 4:, :3], x0) and not cond[:, :, 3:].any() and (cond[:, :4, :3] == 1).all()
            return torch.ones_like(x)

    actions = (torch.zeros(1, 18, 4), torch.zeros(1, 18, 2))
    denoise_chunk(replace(world, dit=Watcher()), x0, noise, actions, Denoising(5))  # type: ignore[arg-type]
    assert len(seen) == 5 and max(seen) < 1e-5  # float32


def test_guidance_stretches_what_the_actions_of_the_made_frames_add(world: WorldModel) -> None:
    known, seen = world.codec.encode(random_video(9, 1)), []
    noise = seeded_noise((known.shape[1], 6, *known.shape[3:]), [0], 1)
    actions = (torch.rand(1, 18, 4).round(), torch.randn(1, 18, 2))
    released = tuple(torch.cat([rows[:, :9], torch.zeros_like(rows[:, 9:])], dim=1) for rows in actions)
    cond, uncond = (denoise_chunk(world, known, noise, rows, Denoising(1)) for rows in (actions, released))  # type: ignore[arg-type]
    found = denoise_chunk(world, known, noise, actions, Denoising(1, guidance=2.5))
    assert (found - uncond).abs().max() > 1e-3
    assert (found - (uncond + 2.5 * (cond - uncond))).abs().max() < 1e-5  # one Euler step is linear; float32

    def answer(rows: Rows) -> Velocity:
        seen.append(rows)
        return lambda x, timestep: x

    cfg(answer, actions, 9, 1.0)
    assert len(seen) == 1 and seen[0] is actions  # no second pass that nobody asked for


@pytest.mark.parametrize("guidance", [0.0, -1.0, float("nan"), float("inf")])
def test_guidance_that_means_nothing_is_refused(guidance: float) -> None:
    with pytest.raises(ValueError, match="guidance"):
        Denoising(guidance=guidance)


def test_a_model_with_vision_is_shown_the_first_frame_of_every_context(world: WorldModel) -> None:
    config = replace(DIT, vision="pooled", img_dim=TOWER.hidden_size)
    dit, tower = (
        ActionDiT(config, torch.Generator().manual_seed(0)).eval(),
        load_tower(TOWER_STATE, TOWER, "the fixture"),
    )
    shown: list[Tensor] = []
    tower.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    seeing = replace(world, dit=dit, tower=tower)
    made = play(seeing, chunks=3)
    assert len(shown) == 3 and torch.equal(shown[0], random_video(1)[:, :, 0])
    for picture, start in zip(shown[1:], (0, 9), strict=True):
        assert torch.equal(picture, to_video(made[:, start : start + 1])[:, :, 0])


def test_bf16_changes_little(run: Path, world: WorldModel) -> None:
    exact, coarse = play(world, chunks=1).float(), play(load_world(run, precision="bf16"), chunks=1).float()
    assert 0 < (exact - coarse).abs().mean() < 8  # of 255; weights and products have 8 bits


def test_frames_survive_the_way_to_video_and_back() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3 * 6).reshape(1, 2, 48, 16, 3)
    assert torch.equal(to_uint8(to_video(frames)), frames)


def test_a_run_folder_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    older, newer = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newer
    (newer / "COMPLETE").unlink()
    assert newest_checkpoint(tmp_path) == older
    with pytest.raises(ValueError, match="never written to the end"):
        newest_checkpoint(newer)


def test_a_changed_codec_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with open(tmp_path / "codec" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match="trained on latents of codec"):
        load_world(folder)


def test_recordings_of_another_action_space_are_refused_by_name() -> None:
    other = replace(GAME, action_space=ActionSpace("kart", ("gas", "brake")))
    with pytest.raises(ValueError, match=r"'kart' \(gas, brake.*'tiny' \(forward, back, left, right"):
        check_same_game(GAME, other, "heldout.json")


# --- the command line ---


def generate(run: Path, *words: str) -> int:
    return run_words("sampling", VERBS, ["generate", str(run), *words])


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.png"
    Image.fromarray(to_uint8(random_video(1))[0, 0].numpy()).save(path)
    return path


def test_generate_writes_a_playable_video_and_a_sheet(
    run: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "demo.mp4"
    assert generate(run, f"prompt={prompt}", "actions=forward+turn_left", "frames=20", "steps=2", f"out={out}") == 0
    info = probe(out)
    assert (info.frames, info.fps) == (20, 17.5) and info.width >= 600
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=no.png"], "no prompt no.png"),
        (["prompt=text.png"], "cannot read the picture"),
        (["prompt=text.mp4"], "text.mp4"),
        (["actions=foward"], "did you mean 'forward'"),
        (["actions=short.csv"], "short.csv has 1 rows for 81 frames"),
        (["actions=kart.csv"], "kart.csv"),
        (["checkpoint=nowhere"], "no checkpoint nowhere"),
        (["out=demo.gif"], "must end in .mp4"),
        (["out=a_folder.mp4"], "a_folder.mp4 is a folder"),
        (["stepz=3"], "did you mean 'steps'"),
        (["frames=100000000000000000000"], "100000000000000000000"),
        (["frames=1000000000"], "frames=1000000000 must be 1 to 1000000"),
        (["steps=1000000000"], "steps=1000000000 must be 1 to 1000"),
        (["guidance=1e300"], "guidance=1e+300 must be"),
        (["mouse_deg=1e300"], "mouse_deg=1e+300 must be -3600 to 3600"),
        (["prompt_frames=1000000000"], "prompt_frames=1000000000 must be 1 to 81"),
        (["device=cuda"], "device=cuda: this machine has 0"),
    ],
)
def test_bad_input_is_one_line_with_status_2_and_nothing_written(
    run: Path,
    prompt: Path,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(tmp_path)
    for name in ("text.png", "text.mp4"):
        Path(name).write_text("no picture")
    Path("short.csv").write_text("frame,forward,back,left,right,pitch_deg,yaw_deg\n0,1,0,0,0,0,0\n")
    Path("kart.csv").write_text("frame,gas,brake\n0,1,0\n")
    Path("a_folder.mp4").mkdir()
    before = sorted(tmp_path.iterdir())
    assert generate(run, f"prompt={prompt}", "out=demo.mp4", *words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_without_a_complete_checkpoint_is_refused_in_one_line(
    tmp_path: Path, prompt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "step_0000001").mkdir(parents=True)
    assert generate(tmp_path / "run", f"prompt={prompt}", f"out={tmp_path}/demo.mp4") == 2
    assert "no complete checkpoint" in capsys.readouterr().err
