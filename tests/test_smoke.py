"""The whole pipeline with tiny settings, from the game to the report, and a second time for nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.shards import load_manifest
from data_pipeline.video import frame_times
from model.world import complete_steps

ROOT = Path(__file__).parent.parent


def run_pipeline(out: Path) -> str:
    """What it prints."""
    command = [sys.executable, "-m", "launch", "pipeline", "configs/pipelines/smoke.yaml", f"out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> tuple[Path, str]:
    """The folder that it leaves, and what it printed."""
    out = tmp_path_factory.mktemp("pipeline") / "smoke"
    return out, run_pipeline(out)


@pytest.fixture(scope="module")
def out(pipeline) -> Path:
    return pipeline[0]


def test_the_pipeline_ends_with_times_and_the_file_to_open(pipeline) -> None:
    out, text = pipeline
    lines = text.strip().splitlines()
    assert lines[-1] == f"open {out}/report/streaming/report.html"
    stages = [line.split()[0] for line in lines[-14:-2]]
    made = ["record", "codec", "encode", "encode", "train", "train", "train", "sample", "stream", "judge", "judge"]
    assert stages == [*made, "all"]
    assert "../chunked/report.html" in (out / "report" / "streaming" / "report.html").read_text()
    assert "</html>" in (out / "report" / "chunked" / "report.html").read_text()


@pytest.mark.parametrize("name", ["demo", "stream"])
def test_the_pipeline_makes_playable_videos_at_the_games_rate(out, name: str) -> None:
    assert frame_times(out / f"{name}.mp4").tolist() == pytest.approx([i / 17.5 for i in range(81)])
    sheet = Image.open(out / f"{name}.png")
    assert sheet.width > 600 and sheet.height > 200


def test_the_pipeline_holds_out_whole_episodes(out) -> None:
    train, heldout = (load_manifest(out / "latents" / split / "manifest.json") for split in ("train", "heldout"))
    names = [{name for shard in manifest.shards for name in shard.episodes} for manifest in (train, heldout)]
    assert names[0] and names[1] and not names[0] & names[1]


@pytest.mark.parametrize("method", ["chunked", "streaming"])
def test_the_reports_have_every_figure(out, method: str) -> None:
    report = json.loads((out / "report" / method / "report.json").read_text())
    assert report["method"] == method
    text = json.dumps(report)
    for word in ("right", "shuffled", "none", "turn_left", "turn_right", "forward", "codec"):
        assert f'"{word}' in text, word
    assert "NaN" not in text


def test_every_stage_trained_to_the_end(out) -> None:
    for run in ("base", "world", "causal"):
        assert complete_steps(out / run)[-1] == "step_0000012"
        last = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()][-1]
        assert last["step"] == 12


def test_a_second_time_reuses_every_stage(out) -> None:
    assert run_pipeline(out).count("complete, reused") == 11
