"""A recording format of one's own is one file and its name in the registry."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from data_pipeline.shard_set import read_clips

ROOT = Path(__file__).parent.parent
TOY = '''"""Videos alone; in the first half of each, `forward` is held."""

from functools import partial

import numpy as np

from data_pipeline.readers.keys import bind_keys, mouse_rows
from data_pipeline.readers.recording import VIDEOS, Format, Recording, cut_episodes, list_files, open_video
from data_pipeline.types import Actions


def find_recordings(source):
    return [Recording(video.stem, partial(read_video, video)) for video in list_files(source, *VIDEOS)]


def read_video(video, game):
    footage, keys = open_video(video, game), bind_keys(game, ["forward"])
    held = [["forward"] if i < footage.frames // 2 else [] for i in range(footage.frames)]
    keyboard = np.stack([keys.row(names, f"{video} frame {i}") for i, names in enumerate(held)])
    return cut_episodes(video.stem, footage, Actions(keyboard, mouse_rows(game.action_space, np.zeros((len(held), 2)))))


FORMAT = Format(find_recordings)
'''


def test_a_format_is_one_file_and_one_line(recordings, codec_folder, game_yaml, tmp_path):
    for folder in ("configs", "model", "data_pipeline"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    readers = tmp_path / "data_pipeline" / "readers"
    (readers / "toy.py").write_text(TOY)
    registry = (readers / "__init__.py").read_text()
    (readers / "__init__.py").write_text(registry.replace('"worldloom", ', '"toy", "worldloom", ', 1))
    (tmp_path / "source").mkdir()
    for name in ("episode_00000", "episode_00001"):
        shutil.copy(recordings / name / "video.mp4", tmp_path / "source" / f"{name}.mp4")
    binding = "game.inputs={others: drop, keys: {forward: [forward], back: [], left: [], right: []}}"
    words = [game_yaml, "reader=toy", "source=source", f"codec={codec_folder}", "out=out", "heldout_every=2", binding]
    command = [sys.executable, "-m", "data_pipeline", "encode", *words]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)
    clips = read_clips(tmp_path / "out" / "train" / "manifest.json")
    assert [(clip.episode, clip.start) for clip in clips] == [("episode_00000", 0), ("episode_00000", 9)]
    assert clips[0].keyboard[:, 0].tolist() == [1] * 15 + [0] * 3
