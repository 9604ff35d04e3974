"""Recordings that cannot be read or decoded: encoding stops at them, or leaves them out, counts and lists them."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from encode_runs import MOMENTS, encode_args, start_workers
from tiny_recordings import FRAMES, spoil_video, write_recording
from tiny_shards import read_tree

from configs.cli import run
from data_pipeline.__main__ import VERBS
from data_pipeline.encode import drop_faulty, encode
from data_pipeline.plan import EncodeConfig
from data_pipeline.shards import load_manifest, read_index
from data_pipeline.types import Episode
from data_pipeline.verify import verify_set


@pytest.fixture(scope="module")
def spoilt(recordings, encode_config, tmp_path_factory) -> EncodeConfig:
    """Train shards of two episodes, 0 and 1 of which 0 cannot be decoded, and 4 and 7, which cannot either; 2 and 5 are
    held out, 3 has no actions, 6 is too short."""
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(recordings, folder / "source")
    for i, frames in ((6, 10), (7, FRAMES)):
        write_recording(folder / "source" / f"episode_{i:05d}", encode_config.game, frames, seed=i)
    for i in (0, 4, 7):
        spoil_video(folder / "source" / f"episode_{i:05d}")
    (folder / "source" / "episode_00003" / "actions.csv").unlink()
    place = {"source": str(folder / "source"), "out": str(folder / "latents")}
    return replace(encode_config, **place, shard_clips=4, on_bad_recording="skip")


@pytest.fixture(scope="module")
def made(spoilt) -> str:
    """The folder of its shards; not to be changed."""
    encode(spoilt)
    return spoilt.out


def test_what_is_left_out_is_counted_in_the_last_line_and_listed(spoilt, made, game_yaml, capsys):
    assert run("data_pipeline", VERBS, encode_args(spoilt, game_yaml)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "encoded 6 clips (0 by this worker) in 2 shards" in last
    assert "4 bad recordings (episode_00003: no file episode_00003/actions.csv, episode_00000: " in last
    assert "1 episodes shorter than" in last and "9 frames of other episodes" in last  # three each of 1, 2 and 5
    listed = json.loads(Path(made, "train", "left_out.json").read_text())
    assert set(listed["bad_recordings"]) == {f"episode_{i:05d}" for i in (0, 3, 4, 7)}
    assert "episode_00004/video.mp4" in listed["bad_recordings"]["episode_00004"]
    assert listed["short_episodes"] == {"episode_00006": 10}


def test_a_shard_holds_what_it_would_without_the_bad_episode(spoilt, made, tmp_path):
    manifest = load_manifest(f"{made}/train/manifest.json")
    assert [info.episodes for info in manifest.shards] == [("episode_00001",)]
    assert not Path(made, "train", "shard-000001.tar").exists()  # of 4 and 7
    assert set(read_index(f"{made}/train/shard-000001.tar").left_out) == {"episode_00004", "episode_00007"}
    assert verify_set(f"{made}/train/manifest.json") == verify_set(f"{made}/heldout/manifest.json") == []
    shutil.copytree(Path(spoilt.source, "episode_00001"), tmp_path / "source" / "episode_00001")
    encode(replace(spoilt, source=str(tmp_path / "source"), out=str(tmp_path / "out"), heldout_every=0))
    alone = (tmp_path / "out" / "train" / "shard-000000.tar").read_bytes()
    assert alone == Path(made, "train", "shard-000000.tar").read_bytes()


def test_workers_that_are_killed_leave_the_same_bytes(spoilt, made, game_yaml, tmp_path):
    config = replace(spoilt, out=str(tmp_path))
    assert start_workers(config, game_yaml, 2, {0: "between shard and index"}) == [-signal.SIGKILL, 0]
    assert read_tree(tmp_path) == read_tree(made)


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_among_bad_recordings_and_started_again(moment, spoilt, made, game_yaml, tmp_path):
    config = replace(spoilt, out=str(tmp_path))
    assert start_workers(config, game_yaml, 1, {0: moment}) == [-signal.SIGKILL]
    assert start_workers(config, game_yaml, 2, {}) == [0, 0]
    assert read_tree(tmp_path) == read_tree(made)


def test_by_default_a_bad_recording_stops_and_a_mended_one_goes_on(spoilt, made, game_yaml, tmp_path, capsys):
    config = replace(spoilt, out=str(tmp_path / "out"), source=str(tmp_path / "source"), on_bad_recording="stop")
    shutil.copytree(spoilt.source, config.source)
    assert run("data_pipeline", VERBS, encode_args(config, game_yaml)) == 2
    assert "no file" in capsys.readouterr().err and not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "source" / "episode_00003")
    config = replace(config, heldout_every=0)
    with pytest.raises(ValueError, match=r"source/episode_0000[047]/video\.mp4"):
        encode(config)
    skipping = replace(config, on_bad_recording="skip")
    assert encode(skipping).clips == 6  # of the same plan
    with pytest.raises(ValueError, match=r"episode_0000[047]/video\.mp4"):  # a shard that skipped it does not count
        encode(config)


def test_repair_tries_a_left_out_episode_again(recordings, spoilt, made, tmp_path):
    config = replace(spoilt, out=str(tmp_path / "out"), source=str(tmp_path / "source"))
    shutil.copytree(spoilt.source, config.source)
    shutil.copytree(made, config.out)
    (line, _) = drop_faulty(config)
    assert "shard-000000.tar: made without episode_00000, tried again" in line
    encode(config)
    assert read_tree(config.out) == read_tree(made)
    shutil.copy(recordings / "episode_00000" / "video.mp4", tmp_path / "source" / "episode_00000" / "video.mp4")
    assert encode(config).new_clips == 0
    drop_faulty(config)
    assert encode(config).clips == 8 and verify_set(f"{config.out}/train/manifest.json") == []


def test_damage_behind_the_last_clip_is_damage_too(encode_config, encoded, tmp_path, monkeypatch):
    """Frames 0 to 26 are in clips, and all of these are made when the damage is seen."""
    whole = Episode.frames

    def frames(episode: Episode):
        for i, frame in enumerate(whole(episode)):
            if episode.id == "episode_00001" and i == 28:
                raise ValueError("concealed damage")
            yield frame

    monkeypatch.setattr(Episode, "frames", frames)
    done = encode(replace(encode_config, out=str(tmp_path), on_bad_recording="skip"))
    assert done.clips == 10 and done.left_out[0].bad_recordings == {"episode_00001": "concealed damage"}
    ours, theirs = (Path(folder, "train/shard-000000.tar").read_bytes() for folder in (tmp_path, encoded))
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("episode_00003", "none of the 0 train episodes.*episode_00003 cannot be read: no file"),
        ("episode_00004", "no train episode can be decoded; episode_00004: .*episode_00004/video.mp4"),
    ],
)
def test_a_set_of_bad_recordings_alone_is_refused(name, message, spoilt, tmp_path):
    shutil.copytree(Path(spoilt.source, name), tmp_path / "source" / name)
    place = {"source": str(tmp_path / "source"), "out": str(tmp_path / "out"), "heldout_every": 0}
    with pytest.raises(ValueError, match=message):
        encode(replace(spoilt, **place))
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
