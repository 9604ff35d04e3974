"""Tiny real objects that many tests share: a game, recordings of it, a codec, shards."""

import hashlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
import yaml
from engine_runs import train as train_with
from fault_proxy import FaultProxy
from foreign_games import write_all
from tiny_recordings import EPISODES, write_recording
from tiny_training import ALONE, STEPS, run
from tiny_world import DIT, GAME, write_codec

from configs import to_dict
from configs.s3 import client
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from model.flow import FlowMatchConfig

BUCKET = "worlds"


def pytest_configure() -> None:
    # A shell lets its background jobs ignore Ctrl-C, and so would the programs that the tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if s3_server.missing_programs():
        terminalreporter.write_line(f"S3: moto, an emulator; for the tests with a real server: {s3_server.INSTALL}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """An S3 server with the bucket `worlds`, started for the first test that asks for it; also a place for caches."""
    cache = tmp_path_factory.mktemp("s3-cache")
    missing = s3_server.missing_programs()
    server = s3_server.Moto() if missing else s3_server.Ceph(tmp_path_factory.mktemp("ceph"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDLOOM_CACHE", str(cache))
        for name, value in s3_server.environment(server.url).items():
            patch.setenv(name, value)
        client().create_bucket(Bucket=BUCKET)
        yield server
    server.stop()


@pytest.fixture
def bucket_folder(s3, tmp_path):
    """The url of a folder of the test's own, with a space and an umlaut in it."""
    return f"s3://{BUCKET}/größe 1/{hashlib.sha256(bytes(tmp_path)).hexdigest()[:12]}"


@pytest.fixture
def proxy(s3, monkeypatch):
    """A proxy in front of the server, through which everything in this test goes."""
    proxy = FaultProxy(s3.port)
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.stop()


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
def sources(tmp_path_factory):
    """A folder of recordings per foreign format; not to be changed."""
    return write_all(tmp_path_factory.mktemp("foreign"))


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
    encode(encode_config)
    return encode_config.out


@pytest.fixture
def copied(encoded, tmp_path) -> Path:
    """A copy of the folder of the train set, to be spoilt."""
    return Path(shutil.copytree(f"{encoded}/train", tmp_path / "train"))


@pytest.fixture(scope="session")
def train_args(encoded, codec_folder, tmp_path_factory) -> list[str]:
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


@pytest.fixture(scope="session")
def alone(train_args, tmp_path_factory) -> Path:
    """The folder of a run on one process, batch 4, float32, with wandb's offline writer on; not to be changed."""
    out = tmp_path_factory.mktemp("alone")
    given = [*train_args, f"out={out}", "engine.name=ddp", "batch=4", "wandb=true"]
    done = run([*ALONE, *given], WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A run takes signals over; here they are given back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def plain(train_args, tmp_path_factory) -> Path:
    """One process, float32, one micro-step."""
    out = tmp_path_factory.mktemp("plain")
    train_with("ddp", 1, out, *train_args, accumulation=1)
    return out
