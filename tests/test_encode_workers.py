"""Many workers on one shard set: killed anywhere, started again in other numbers, with the same bytes."""

import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encode_runs import DIES, MOMENTS, encode_args, start, start_workers
from tiny_recordings import numbered_episode
from tiny_shards import read_tree

from configs import storage
from configs.game import InputConfig
from configs.s3 import upload
from data_pipeline.encode import encode, make_missing, sort_jobs
from data_pipeline.plan import make_plans
from data_pipeline.resample import resample
from data_pipeline.shards import index_url
from model.codec import load_codec

# What a worker alone must have left when it was killed there.
LEFT = {
    "beginning a shard": lambda names: shards(names, ".tar") <= 1 and "train/plan.json" in names,
    "writing a shard": lambda names: shards(names, ".tar") == 1 and any("/.shard-000001" in name for name in names),
    "between shard and index": lambda names: shards(names, ".tar") == 1 and not shards(names, ".index.json"),
    "index written": lambda names: shards(names, ".tar") == shards(names, ".index.json") == 1,
    "before the manifest": lambda names: shards(names, ".tar") == 6 and not any("manifest" in name for name in names),
    "writing the manifest": lambda names: any("/.manifest" in name and ".tmp" in name for name in names),
    "between the manifests": lambda names: [name for name in names if "manifest" in name] == ["train/manifest.json"],
}


def shards(names: Iterable[str], suffix: str) -> int:
    return sum(name.endswith(suffix) and "/." not in name for name in names)


@pytest.fixture
def config(encode_config, tmp_path):
    """The settings that made `encoded`, into an empty folder."""
    return replace(encode_config, out=str(tmp_path))


def test_workers_without_a_number_leave_the_bytes_of_one(config, encoded, tmp_path):
    """Two at once in this process, each in a thread."""
    with ThreadPoolExecutor(2) as pool:
        made = [done.new_clips for done in pool.map(encode, [config, config])]
    assert sum(made) >= 12 and read_tree(tmp_path) == read_tree(encoded)


@pytest.mark.parametrize(("jobs", "world"), [(7, 1), (7, 3), (2, 3)])
def test_a_worker_makes_its_share_first_and_then_what_is_missing(jobs, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    shares = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        order = sort_jobs(range(jobs))
        assert sorted(order) == list(range(jobs))
        shares += order[: len(range(rank, jobs, world))]
    assert sorted(shares) == list(range(jobs))


@pytest.mark.parametrize("moment", LEFT)
def test_a_worker_is_killed_at_the_moment_that_is_named(moment, config, encoded, game_yaml, tmp_path):
    assert start_workers(config, game_yaml, 1, {0: moment}) == [-signal.SIGKILL]
    left = read_tree(tmp_path)
    assert LEFT[moment](left), sorted(left)
    encode(config)
    assert read_tree(tmp_path) == read_tree(encoded)


@pytest.mark.parametrize(
    ("dying", "statuses"),
    [
        ({0: "encoding"}, [-signal.SIGKILL, 0]),
        ({0: "between shard and index"}, [-signal.SIGKILL, 0]),
        ({0: "writing a shard", 1: "beginning a shard"}, [-signal.SIGKILL] * 2),
    ],
)
def test_the_others_or_one_started_again_take_over_from_workers_that_are_killed(
    dying, statuses, config, encoded, game_yaml, tmp_path
):
    assert start_workers(config, game_yaml, 2, dying) == statuses
    assert (read_tree(tmp_path) == read_tree(encoded)) == (0 in statuses)
    encode(config)
    assert read_tree(tmp_path) == read_tree(encoded)


def test_a_shard_that_another_worker_drops_late_is_made_again(config, encoded, tmp_path, monkeypatch):
    """As by several that `repair`: one finds a fault in a shard that the other has counted as there."""
    passes = []

    def make_and_lose(encoder, jobs):
        passes.append(made := make_missing(encoder, jobs))
        if len(passes) < 3:
            storage.remove(index_url(jobs[0].url))
        return made

    monkeypatch.setattr("data_pipeline.encode.make_missing", make_and_lose)
    assert encode(config).new_clips == 12 + 2 * 2 and len(passes) == 3
    assert read_tree(tmp_path) == read_tree(encoded)


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_killed_anywhere_and_started_again_in_other_numbers(
    moment, before, after, config, encoded, game_yaml, tmp_path
):
    """`make test-encode`. The first worker dies at the moment; the others a little later or earlier, all of them."""
    rest = {rank: "beginning a shard" for rank in range(1, before)}
    first, *others = start_workers(config, game_yaml, before, {0: moment, **rest})
    assert first == -signal.SIGKILL and set(others) <= {-signal.SIGKILL, 0}
    assert start_workers(config, game_yaml, after, {}) == [0] * after
    same = read_tree(tmp_path) == read_tree(encoded)
    print(f"| {moment} | {before} -> {after} | {'identical' if same else 'DIFFERENT'} |")
    assert same


def test_a_worker_dies_while_two_encode_into_a_bucket(s3, recordings, encode_config, encoded, game_yaml, bucket_folder):
    for name in storage.list_tree(recordings):
        upload(Path(recordings) / name, f"{bucket_folder}/recordings/{name}")
    config = replace(encode_config, source=f"{bucket_folder}/recordings", out=f"{bucket_folder}/latents")
    args = encode_args(config, game_yaml)
    dying = start([sys.executable, "-c", DIES, MOMENTS["index written"], *args], workers=2, rank=0)
    until = time.monotonic() + 60
    while not any(name.endswith("plan.json") for name in storage.list_tree(config.out)):  # else the other may do it all
        assert dying.poll() is None and time.monotonic() < until
    other = start([sys.executable, "-m", "data_pipeline", *args], workers=2, rank=1)
    assert (dying.wait(timeout=120), other.wait(timeout=120)) == (-signal.SIGKILL, 0)
    left = {name: storage.read_bytes(f"{config.out}/{name}") for name in storage.list_tree(config.out)}
    assert left == read_tree(encoded)


@pytest.mark.parametrize(
    ("recorded", "fps", "kept"),
    [(60, 20, [0, 3, 6]), (60, 16, [0, 3, 7]), (20, 20, list(range(12))), (30, 17.5, [0, 1, 3, 5, 6, 8])],
)
def test_a_resampled_episode_keeps_frames_and_everything_that_was_done(recorded, fps, kept):
    episode = resample(numbered_episode(np.eye(12, 2, dtype=np.float32)), fps, recorded)
    numbers = [int(frame[0, 0, 0]) for frame in episode.frames()]
    assert numbers[: len(kept)] == kept and len(numbers) == len(episode.actions)
    spans = np.diff([*numbers, numbers[-1] + int(episode.actions.mouse[-1, 0])])
    np.testing.assert_array_equal(episode.actions.mouse[:, 0], spans)  # one degree per recorded frame adds up
    assert episode.actions.keyboard[0, 0] == 1 and episode.actions.keyboard[1:, 0].max() == 0
    assert episode.actions.keyboard[:, 1].sum() == 1  # held in recorded frame 1 alone, and not lost


def test_recordings_of_another_rate_are_encoded_at_the_games(encode_config, tmp_path):
    game = replace(encode_config.game, fps=encode_config.game.fps / 2, inputs=InputConfig(fps=encode_config.game.fps))
    config = replace(encode_config, game=game, out=str(tmp_path), clip_frames=9, stride=3)
    plans = make_plans(config, load_codec(config.codec))
    assert {len(episode.actions) for job in plans[0].jobs for episode in job.episodes} == {15}
    assert encode(config).clips == 18
    with pytest.raises(ValueError, match=r"inputs\.fps"):
        replace(game, inputs=InputConfig(fps=1.0))
