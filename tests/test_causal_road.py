"""A causal model on its road: continuous clips, diffusion forcing, a stream."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_world import DIT

from configs import to_dict
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from data_pipeline.video import probe
from model.flow import FlowMatchConfig
from model.masks import CausalConfig

ROOT = Path(__file__).parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def settings(encode_config: EncodeConfig, codec_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("continuous")
    encode(replace(encode_config, out=str(folder / "latents"), layout="continuous", clip_frames=21))
    given = {
        "model": to_dict(replace(DIT, causal=CausalConfig(block=3, window=6))),
        "flow": to_dict(FlowMatchConfig()),
        "manifest": f"{folder}/latents/train/manifest.json",
        "codec": str(codec_folder),
        "steps": 4,
        "batch": 2,
        "objective": {"name": "diffusion_forcing", "context_share": 0.5, "context_noise": 0.1},
        "log_every": 2,
        "engine": {"name": "ddp"},
        "validation": {"manifest": f"{folder}/latents/heldout/manifest.json", "every": 4, "clips": 2},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(given))
    return [str(folder / "train.yaml")]


def test_a_causal_model_is_trained_on_continuous_clips_and_streams(settings: list[str], tmp_path: Path) -> None:
    done = run("train", *settings, f"out={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"heldout/right"' in metrics and '"loss"' in metrics
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / "frame.png")
    words = [f"prompt={tmp_path / 'frame.png'}", f"out={tmp_path / 'demo.mp4'}", "frames=33", "steps=1"]
    done = run("sampling", "generate", str(tmp_path / "run"), *words)
    assert done.returncode == 0, done.stderr
    assert probe(tmp_path / "demo.mp4").frames == 33


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.causal=null"], "not causal"),
        (["model.causal.block=2", "model.causal.window=4"], "must be equal"),
    ],
)
def test_a_model_that_does_not_fit_objective_or_clips_is_refused(
    settings: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    done = run("train", *settings, f"out={tmp_path / 'run'}", *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
