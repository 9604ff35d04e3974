"""Tiny real objects that many tests share: a game, recordings of it, a codec, shards."""

import pytest
import yaml
from tiny_recordings import EPISODES, write_recording
from tiny_training import STEPS
from tiny_world import DIT, GAME, write_codec

from configs import to_dict
from data_pipeline.encode import EncodeConfig, encode_recordings
from model.flow import FlowMatchConfig


@pytest.fixture(scope="session")
def game():
    return GAME


@pytest.fixture(scope="session")
def game_yaml(game, tmp_path_factory):
    """A YAML file with the key `game:`, as those in configs/games."""
    path = tmp_path_factory.mktemp("game") / "tiny.yaml"
    path.write_text(yaml.safe_dump({"game": to_dict(game)}))
    return str(path)


@pytest.fixture(scope="session")
def recordings(game, tmp_path_factory):
    """A folder of 6 synthetic episodes of 30 frames; not to be changed."""
    folder = tmp_path_factory.mktemp("recordings")
    for i in range(EPISODES):
        write_recording(folder / f"episode_{i:05d}", game, seed=i)
    return folder


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory):
    """The smallest codec of the demo's kind: fitted encoder, untrained decoder."""
    folder = tmp_path_factory.mktemp("codec")
    write_codec(folder)
    return folder


@pytest.fixture(scope="session")
def encode_config(game, recordings, codec_folder, tmp_path_factory):
    """4 train shards of 2 clips and 2 held-out ones, of 18 frames each."""
    out = str(tmp_path_factory.mktemp("latents"))
    return EncodeConfig(game, str(recordings), str(codec_folder), out, shard_clips=2, heldout_every=3)


@pytest.fixture(scope="session")
def encoded(encode_config):
    """The folder with train/ and heldout/; not to be changed."""
    encode_recordings(encode_config)
    return encode_config.out


@pytest.fixture(scope="session")
def train_words(encoded, codec_folder, tmp_path_factory) -> list[str]:
    """The settings that all runs here share: a clip norm that bites, a learning rate that moves the weights."""
    path = tmp_path_factory.mktemp("train") / "tiny.yaml"
    settings = {
        "model": {**to_dict(DIT), "checkpoint_every": 1},
        "flow": to_dict(FlowMatchConfig()),
        "manifest": f"{encoded}/train/manifest.json",
        "codec": str(codec_folder),
        "steps": STEPS,
        "objective": {"name": "autoregressive", "base_share": 0.3, "context_noise": 0.1},
        "log_every": 1,
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 4, "clip_norm": 0.05},
        "checkpoint": {"every": 100, "keep_last": 2},
        "validation": {"manifest": f"{encoded}/heldout/manifest.json", "every": 4, "clips": 2},
    }
    path.write_text(yaml.safe_dump(settings))
    return [str(path)]
