"""A recording format of one's own is one file and its name in the registry."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tiny_shards import read_clips

ROOT = Path(__file__).parent.parent


def test_a_format_is_one_file_and_one_line(recordings, codec_folder, game_yaml, tmp_path):
    for folder in ("configs", "model", "data_pipeline"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    readers = tmp_path / "data_pipeline" / "readers"
    shutil.copy(ROOT / "tests" / "toy_format.py", readers / "toy.py")
    registry = (readers / "__init__.py").read_text()
    (readers / "__init__.py").write_text(registry.replace('"worldloom", ', '"toy", "worldloom", ', 1))
    (tmp_path / "source").mkdir()
    for name in ("episode_00000", "episode_00001"):
        shutil.copy(recordings / name / "video.mp4", tmp_path / "source" / f"{name}.mp4")
    binding = "game.inputs={others: drop, keys: {forward: [forward], back: [], left: [], right: []}}"
    args = [game_yaml, "reader=toy", "source=source", f"codec={codec_folder}", "out=out", "heldout_every=2", binding]
    command = [sys.executable, "-m", "data_pipeline", "encode", *args]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)
    clips = read_clips(tmp_path / "out" / "train" / "manifest.json")
    assert [(clip.episode, clip.start) for clip in clips] == [("episode_00000", 0), ("episode_00000", 9)]
    assert clips[0].keyboard[:, 0].tolist() == [1] * 15 + [0] * 3
