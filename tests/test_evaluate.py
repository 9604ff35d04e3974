"""The figures of a model and of its frames, and `evaluate`, which reports them."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pages import PLANTED, Page
from tiny_world import DIT, GAME, change, random_dit, write_causal, write_checkpoint
from torch import Tensor, nn
from toy_game import texture

from configs.cli import run
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from data_pipeline.readers.worldloom import describe_episode, write_episode
from data_pipeline.types import Batch
from data_pipeline.video import probe
from model.flow import FlowMatch, FlowMatchConfig
from model.loss import NoiseSample, sigma_bins, velocity_loss
from model.world import WORLD_FILE, load_world, newest_checkpoint
from sampling.__main__ import VERBS
from sampling.evaluate import EvaluateConfig, evaluate, loss_of_clips
from sampling.metrics import (
    action_loss_table,
    action_variants,
    cut_clips,
    first_latents,
    other_episodes,
)  # fmt: skip
from sampling.report import compared, write_page
from sampling.video_grid import GAP, LABEL_HEIGHT, TITLE_HEIGHT, VideoGrid

FLOW = FlowMatch(FlowMatchConfig())


def test_every_clip_gets_the_actions_of_another_episode_or_there_is_no_such_figure() -> None:
    ids = ("a:0", "b:0", "a:9", "c:0", "b:9", "c:9")
    partner = other_episodes(ids)
    assert partner is not None and sorted(partner) == list(range(6))
    assert all(ids[i][0] != ids[j][0] for i, j in enumerate(partner))
    assert other_episodes(("a:0", "a:9", "b:0")) in ([2, 2, 0], [2, 2, 1])
    assert other_episodes(("a:0", "a:9")) is None
    assert set(action_variants(random_batch(("a:0", "a:9")))) == {"right", "none"}


def random_batch(ids: tuple[str, ...] = ("a:0", "b:0", "c:0", "d:0"), latents: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    b, frames = len(ids), 3 * latents
    keyboard = (torch.rand(b, frames, 4, generator=generator) > 0.5).float()
    mouse = torch.randn(b, frames, 2, generator=generator)
    return Batch(torch.randn(b, DIT.out_dim, latents, 4, 6, generator=generator), keyboard, mouse, ids)


def random_noise(batch: Batch) -> NoiseSample:
    generator = torch.Generator().manual_seed(2)
    return NoiseSample(torch.linspace(0.2, 0.9, len(batch.ids)), torch.randn(batch.latents.shape, generator=generator))


def test_the_loss_of_a_clip_does_not_depend_on_the_other_clips_and_sees_its_actions() -> None:
    batch, dit = random_batch(), random_dit()
    sample = random_noise(batch)
    with torch.inference_mode():
        together = velocity_loss(dit, FLOW, batch, 3, sample)
        third = velocity_loss(dit, FLOW, batch[2:3], 3, NoiseSample(sample.sigma[2:3], sample.noise[2:3]))
        shuffled = velocity_loss(dit, FLOW, action_variants(batch)["shuffled"], 3, sample)
    assert third.item() == pytest.approx(together[2].item(), rel=1e-5)  # float32 sums in another order
    assert (shuffled != together).all()


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_loss_is_the_error_of_the_velocity_of_unknown_latents(error: float) -> None:
    batch = random_batch()
    sample = random_noise(batch)

    class Oracle(nn.Module):
        config = DIT

        def forward(self, x: Tensor, timestep: Tensor, **rest: Tensor) -> Tensor:
            velocity = sample.noise - batch.latents
            velocity[:, :, :3] += 7  # of known latents
            velocity[:, :, 3:] += error
            return velocity

    assert velocity_loss(Oracle(), FLOW, batch, 3, sample).numpy() == pytest.approx(error)


def test_the_table_weighs_noise_levels_as_training_draws_them_and_pairs_clips() -> None:
    bins = sigma_bins(FLOW)
    assert [name for name, _ in bins] == ["sigma_0.00-0.25", "sigma_0.25-0.50", "sigma_0.50-0.75", "sigma_0.75-1.00"]
    assert sum(len(levels) for _, levels in bins) == 1000
    right = {name: torch.tensor([1.0, 3.0]) for name, _ in bins}
    worse = {name: values + torch.tensor([0.1, 0.3]) for name, values in right.items()}
    table = action_loss_table({"right": right, "shuffled": worse}, FLOW)
    assert table["right"]["loss"] == pytest.approx(2.0)
    assert table["shuffled"]["minus_right"] == pytest.approx(0.2)
    assert table["shuffled"]["standard_error"] == pytest.approx(0.1)  # std 0.1414 / sqrt(2)


def test_clips_are_cut_to_chunks_and_to_their_first_latents_with_the_actions_of_their_frames() -> None:
    batch = random_batch()
    second = cut_clips(batch, slice(3, 6), slice(9, 18))
    assert torch.equal(second.latents, batch.latents[:, :, 3:]) and torch.equal(second.mouse, batch.mouse[:, 9:])
    longer = Batch(torch.zeros(4, 8, 9, 4, 6), torch.zeros(4, 33, 4), torch.zeros(4, 33, 2), batch.ids)
    chunked, continuous = (first_latents(longer, 6, layout, 4) for layout in ("chunked", "continuous"))
    assert (chunked.keyboard.shape[1], continuous.keyboard.shape[1]) == (18, 21) and chunked.latents.shape[2] == 6


SMALL: dict[str, Any] = {
    "clips": 4, "starts": 2, "frames": (5, 14), "held_starts": 2, "held_spans": 1, "long_s": 2.0, "long_starts": 1,
    "steps": 1, "guidance": 1.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `run`, and recordings whose picture pans against their turn, with shards of them."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_checkpoint(folder / "run")
    whole, rng = texture(GAME.height, 400), np.random.default_rng(0)
    for i in range(4):
        keyboard, mouse_deg = np.zeros((40, 4)), np.tile([0.0, 3.0], (40, 1))
        keyboard[:, rng.integers(4)] = 1
        pictures = [whole[:, 3 * j : 3 * j + GAME.width] for j in range(40)]
        episode = folder / "recordings" / f"episode_{i}"
        write_episode(episode, describe_episode(GAME, 40), pictures, keyboard, mouse_deg)
    source, codec, out = (str(folder / name) for name in ("recordings", "run/codec", "shards"))
    encode(EncodeConfig(GAME, source, codec, out, heldout_every=2))
    return folder


def paths(folder: Path, out: Path) -> dict[str, str]:
    manifest = f"{folder}/shards/heldout/manifest.json"
    return {"recordings": f"{folder}/recordings", "manifest": manifest, "out": str(out)}


def run_evaluate(folder: Path, out: Path, *args: str) -> int:
    given = {**paths(folder, out), **SMALL, "frames": list(SMALL["frames"])}
    settings = [f"{name}={value}" for name, value in given.items()]
    return run("sampling", VERBS, ["evaluate", str(folder / "run"), *settings, *args])


@pytest.fixture(scope="module")
def judged(folder: Path) -> Path:
    """The folder of a report."""
    settings: dict[str, Any] = {**paths(folder, folder / "judged"), **SMALL}
    evaluate(EvaluateConfig(checkpoint=str(folder / "run"), **settings))
    return folder / "judged"


def test_evaluate_answers_every_question_and_writes_a_page(judged: Path) -> None:
    report = json.loads((judged / "report.json").read_text())
    assert set(report["velocity_loss"]) == {"first_chunk", "next_chunk"}
    assert {"right", "shuffled", "none"} <= set(report["velocity_loss"]["next_chunk"])
    assert {"generated", "hold", "codec"} == set(report["psnr_db"])
    assert len(report["psnr_db"]["generated"]["by_frame"]) == 14 and set(report["at_frames"]) == {"5", "14"}
    held = report["held"]
    assert {"turn_left", "turn_right", "left", "right", "forward", "back"} <= set(held)
    assert all({"obeyed", "idle", "px", "idle_px", "spans"} <= set(figures) for figures in held.values())
    assert held["turn_right"]["real"] == 1 and held["turn_right"]["real_spans"] > 0  # the recorded picture obeys it
    assert set(report["return"]["likeness"]) == {"codec", "returned", "idle", "away", "another rollout"}
    assert set(report["long"]["ratio"]) == set(report["long"]["real"]) == {"sharpness", "brightness", "colourfulness"}
    assert report["long"]["turns"]["spans"] == 1
    assert "NaN" not in (judged / "report.json").read_text()
    page = (judged / "report.html").read_text()
    for name, frames in (("replay", 15), ("held", 13)):
        assert f"{name}.mp4" in page and probe(judged / f"{name}.mp4").frames == frames
    assert page.count("<svg") == 2 and "Evaluator" in page and 'src="sheet.png"' in page


def test_the_sheet_has_a_row_per_rollout_and_a_column_per_frame(judged: Path) -> None:
    sheet = cv2.imread(str(judged / "sheet.png"))
    assert sheet is not None
    columns, rows = 3, 2 * 2 + 9  # real and generated from two starts; nine commands
    tile = np.array([GAME.height * 320 / GAME.width + LABEL_HEIGHT + GAP, 320 + GAP])
    assert sheet.shape[:2] == pytest.approx(tile * [rows, columns] + [TITLE_HEIGHT + GAP, GAP], abs=rows)


def test_without_a_long_run_nothing_of_it_is_reported(folder: Path, tmp_path: Path) -> None:
    assert run_evaluate(folder, tmp_path, "long_s=0") == 0
    assert "long" not in json.loads((tmp_path / "report.json").read_text())
    assert "Does it last?" not in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def causal(folder: Path, judged: Path) -> tuple[str, ...]:
    """Arguments that judge a causal checkpoint on continuous clips of the same recordings, beside the chunked one."""
    checkpoint = write_causal(folder / "causal")
    source, codec, out = (str(folder / name) for name in ("recordings", "causal/codec", "continuous"))
    encode(EncodeConfig(GAME, source, codec, out, layout="continuous", clip_frames=21, heldout_every=2))
    return f"checkpoint={checkpoint}", f"manifest={out}/heldout/manifest.json", f"beside=[{judged}/report.json]"


def test_a_causal_model_is_judged_by_its_streams_on_the_same_places_beside_the_chunked_one(
    folder: Path, judged: Path, causal: tuple[str, ...]
) -> None:
    assert run_evaluate(folder, folder / "streamed", *causal) == 0
    chunked, streamed = (json.loads((out / "report.json").read_text()) for out in (judged, folder / "streamed"))
    assert (chunked["method"], streamed["method"]) == ("chunked", "streaming")
    assert chunked["psnr_db"]["hold"] == streamed["psnr_db"]["hold"]
    assert chunked["psnr_db"]["generated"] != streamed["psnr_db"]["generated"]
    assert len(streamed["psnr_db"]["generated"]["by_frame"]) == 14 and set(chunked["held"]) == set(streamed["held"])
    for kind in ("first_chunk", "next_chunk"):
        assert {"right", "shuffled", "none"} <= set(streamed["velocity_loss"][kind])
    page = (folder / "streamed" / "report.html").read_text()
    assert "Beside other models" in page and 'href="../judged/report.html"' in page


def test_a_page_shows_what_reports_say_as_text_alone(judged: Path, tmp_path: Path) -> None:
    report = json.loads((judged / "report.json").read_text())
    for table in ("velocity_loss", "held"):
        report[table] = {f"{name}{PLANTED}": figures for name, figures in report[table].items()}
    report |= {"method": f"$x^{PLANTED}", "checkpoint": PLANTED, "evaluator": PLANTED}
    video = VideoGrid("replay", PLANTED, PLANTED, [], 1, 1)
    write_page(tmp_path / "report.html", report, [video], [compared(report, PLANTED)])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.is_closed_to(PLANTED) and page.tags.count("title") == 1 and page.tags.count("svg") >= 3


@pytest.mark.parametrize(
    "damage",
    [
        "[]", "{}", "", "\xff\xfe", "[" * 200_000,
        {"psnr_db": 7}, {"method": ["x"]}, {"velocity_loss": []}, {"at_frames": {"9": {}}}, {"return": 1},
        {"long": {"ratio": []}},
        {"held": {"left": {"obeyed": "all"}}}, {"held": {"left": {"obeyed": 10**400}}},
    ],
    ids=lambda damage: repr(damage)[:40],
)  # fmt: skip
def test_a_damaged_report_beside_is_one_line_before_anything_is_judged(
    folder: Path, judged: Path, tmp_path: Path, damage: str | dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "report.json"
    if not isinstance(damage, str):
        damage = json.dumps({**json.loads((judged / "report.json").read_text()), **damage})
    other.write_text(damage, encoding="latin-1")
    assert run_evaluate(folder, tmp_path / "out", f"beside=[{other}]") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(other) in line and len(line) < 500 and not (tmp_path / "out").exists()


def test_the_past_of_a_causal_model_is_clean_and_not_part_of_its_loss(causal: tuple[str, ...]) -> None:
    world = load_world(causal[0].partition("=")[2])
    batch = random_batch(latents=7)
    clips = cut_clips(batch, slice(6), slice(21))
    seen: list[Tensor] = []
    world.dit.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.inference_mode():
        loss = loss_of_clips(world, clips, random_noise(clips), 4)
    assert torch.equal(seen[0][:, :3], torch.zeros(4, 3)) and (seen[0][:, 3:] > 0).all() and loss.shape == (4,)


@pytest.mark.parametrize(
    "arg",
    [
        "beside=[nowhere.json]", "manifest=nowhere.json", "recordings=nowhere", "frames=[99]", "frames=[]", "starts=0",
        "held_starts=1000000000", "mouse_deg=1e9", "long_s=-1", "reader=obs",
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_the_setting_or_file(
    folder: Path, tmp_path: Path, arg: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, value = arg.partition("=")
    assert run_evaluate(folder, tmp_path / "out", arg) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert (value.strip("[]") if "nowhere" in value else name) in line and not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_is_named_before_anything_is_judged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert run_evaluate(folder, tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert str(tmp_path / "out") in printed and "velocity" not in printed and "held-out loss" not in printed


def test_a_checkpoint_of_another_codec_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(newest_checkpoint(folder / "run"), tmp_path / "step_0000001"))
    change(checkpoint / WORLD_FILE, codec_hash="0" * 12)
    assert run_evaluate(folder, tmp_path / "out", f"checkpoint={checkpoint}") == 2
    assert "codec_hash" in capsys.readouterr().err
