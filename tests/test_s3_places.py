"""Everything that takes a path takes an s3:// url, and makes the same of it."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from fault_proxy import Fault
from foreign_games import load_game, read_all, write_all
from tiny_recordings import draw_frames, write_recording
from tiny_released import SMALL, model_command, model_of, random_state, same_bits, yamls
from tiny_world import GAME, write_checkpoint

from configs import load_config, s3, save_config, storage, to_dict
from configs.cli import run
from configs.s3 import DOWNLOADS
from data_pipeline.__main__ import VERBS as DATA_VERBS
from data_pipeline.encode import encode
from data_pipeline.readers import Reader, find_recordings
from data_pipeline.readers.worldloom import ABOUT, describe_episode, write_actions, write_episode
from data_pipeline.shard_set import TRIES
from data_pipeline.stream import LoaderConfig, Stream
from data_pipeline.verify import verify_set
from data_pipeline.video import frame_times, probe, read_frames, write_video
from model.official import WEIGHTS_NAME
from model.weights import load_weights, open_weights, save_weights
from model.world import COMPLETE, WORLD_FILE, newest_checkpoint, read_world_config
from sampling.__main__ import VERBS
from train.codec import CodecTrainConfig, train_codec


def put(folder: Path, url: str) -> str:
    """Copies a folder of this machine to the bucket; returns the url."""
    for name in storage.list_tree(folder):
        s3.upload(folder / name, storage.join(url, name))
    return url


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory, recordings, codec_folder) -> str:
    """The tiny recordings and their codec, and a checkpoint that names it, in a bucket."""
    url = "s3://worlds/every place"
    put(recordings, f"{url}/recordings")
    put(codec_folder, f"{url}/codec")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run"))
    world = replace(read_world_config(checkpoint), codec=f"{url}/codec")
    save_config(world, checkpoint / WORLD_FILE)
    put(checkpoint, f"{url}/run/{checkpoint.name}")
    return url


@pytest.fixture(autouse=True)
def nothing_here_is_called_s3(tmp_path, monkeypatch) -> Iterator[None]:
    """A url taken for a path would leave a folder of that name."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "s3:").exists()


def test_recordings_and_a_codec_in_a_bucket_give_the_same_shards(bucket, encode_config, encoded) -> None:
    out = f"{bucket}/latents"
    encode(replace(encode_config, source=f"{bucket}/recordings", codec=f"{bucket}/codec", out=out))
    for split in ("train", "heldout"):
        manifest = f"{out}/{split}/manifest.json"
        assert storage.read_bytes(manifest) == storage.read_bytes(f"{encoded}/{split}/manifest.json")
        assert verify_set(manifest) == []
    remote, local = (Stream(f"{folder}/train/manifest.json", 2, seed=0).batch_at(3) for folder in (out, encoded))
    assert remote.ids == local.ids and remote.latents.equal(local.latents)


@pytest.fixture(scope="module")
def remote_set(s3, encoded) -> str:
    """The training set in a bucket."""
    return f"{put(Path(encoded) / 'train', 's3://worlds/read here')}/manifest.json"


def shard_reads(proxy, name: str = ".tar") -> list[str]:
    """The shards that were asked for, as often as they were."""
    gets = [request.rpartition("/")[2] for request in proxy.requests if request.startswith("GET")]
    return [url for url in gets if url.endswith(name)]


@pytest.mark.parametrize("shuffle_shards", [0, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_set_in_a_bucket_is_read_in_the_same_order(shuffle_shards, workers, remote_set, encoded) -> None:
    loader = LoaderConfig(shuffle_shards)
    local = Stream(f"{encoded}/train/manifest.json", 3, seed=1, workers=0, loader=loader)
    with closing(Stream(remote_set, 3, seed=1, workers=workers, loader=loader).batches(2)) as batches:
        for step, batch in zip(range(2, 8), batches, strict=False):
            same = local.batch_at(step)
            assert batch.ids == same.ids and batch.latents.equal(same.latents) and batch.mouse.equal(same.mouse)


def test_shards_that_are_copied_are_asked_for_once(remote_set, proxy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLDLOOM_CACHE", str(tmp_path / "cache"))
    stream = Stream(remote_set, 4, seed=1, workers=1, loader=LoaderConfig(shuffle_shards=2))
    proxy.requests.clear()
    with closing(stream.batches()) as batches:
        assert len({name for batch in islice(batches, 6) for name in batch.ids}) == len(stream)
    assert sorted(shard_reads(proxy)) == [shard.info.url for shard in stream.shards.shards]


def test_a_read_that_fails_once_is_tried_again_and_a_refusal_is_no_corruption(remote_set, proxy) -> None:
    stream = Stream(remote_set, 2, seed=1, loader=LoaderConfig(on_corrupt="skip"))
    once = proxy.add(Fault("refused", r"^GET .*\.tar", times=1))
    assert stream.batch_at(0).skipped == 0 and once.met == 1
    always = proxy.add(Fault("refused", r"^GET .*\.tar"))
    with pytest.raises(PermissionError, match=r"shard-00000\d.tar: the server refuses"):
        stream.batch_at(3)
    assert always.met == 2


@pytest.mark.parametrize(("where", "gets_per_try"), [("in the bucket", 1), ("on its way", DOWNLOADS)])
def test_a_damaged_shard_is_fetched_so_many_times_and_then_never_again(
    where, gets_per_try, bucket_folder, encoded, proxy, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("WORLDLOOM_CACHE", str(tmp_path / "cache"))
    url = put(Path(encoded) / "train", bucket_folder)
    if where == "in the bucket":
        data = bytearray(storage.read_bytes(f"{url}/shard-000001.tar"))
        data[3000] ^= 1
        with storage.writing(f"{url}/shard-000001.tar") as part:
            part.write_bytes(data)
        with pytest.raises(ValueError, match=r"shard-000001.tar is altered: .*; run python -m data_pipeline verify"):
            Stream(f"{url}/manifest.json", 8, seed=1, loader=LoaderConfig(shuffle_shards=2)).batch_at(0)
    else:
        proxy.add(Fault("altered", "^GET .*shard-000001.tar"))
    loader = LoaderConfig(shuffle_shards=2, on_corrupt="skip")
    proxy.requests.clear()
    with closing(Stream(f"{url}/manifest.json", 2, seed=1, workers=2, loader=loader).batches()) as batches:
        skipped = [batch.skipped for batch in islice(batches, 16)]  # four epochs
    assert sum(skipped) >= 8 and len(shard_reads(proxy, "shard-000001.tar")) == TRIES * gets_per_try


@pytest.mark.long
def test_every_reader_reads_the_same_from_a_bucket(bucket, tmp_path) -> None:
    sources = write_all(tmp_path / "foreign")
    assert sources.keys() == {*get_args(Reader)}
    for reader, source in sources.items():
        game = load_game(reader, tmp_path)
        url = put(source, f"{bucket}/foreign/{reader}")
        remote, local = (read_all(reader, folder, game) for folder in (url, source))  # type: ignore[arg-type]
        assert [episode.id for episode in remote] == [episode.id for episode in local]
        for pair in zip(remote, local, strict=True):
            keyboards, frames = zip(
                *((episode.actions.keyboard, list(episode.frames())) for episode in pair), strict=True
            )
            np.testing.assert_array_equal(*keyboards)
            np.testing.assert_array_equal(*frames)


def test_recordings_in_a_bucket_are_examined_alike(bucket, recordings, game_yaml, tmp_path) -> None:
    reports = []
    for source, out in ((recordings, tmp_path), (f"{bucket}/recordings", bucket)):
        args = ["doctor", game_yaml, f"source={source}", f"out={out}/report.json"]
        assert run("data_pipeline", DATA_VERBS, args) == 0
        reports.append(json.loads(storage.read_bytes(f"{out}/report.json")))
    assert reports[0] == reports[1] and reports[0]["recordings"]


def test_an_episode_in_a_bucket_is_written_with_what_tells_of_it_last(bucket, proxy) -> None:
    frames, keyboard, mouse_deg = draw_frames(GAME, 9, seed=1)
    write_episode(f"{bucket}/new/episode_00000", describe_episode(GAME, 9), frames, keyboard, mouse_deg)
    puts = [request for request in proxy.requests if request.startswith("PUT")]
    assert puts[-1].endswith(ABOUT) and len(puts) == 3
    (recording,) = find_recordings("worldloom", f"{bucket}/new")
    (episode,) = recording.read(GAME)
    assert np.array_equal(episode.actions.keyboard, keyboard) and len(list(episode.frames())) == 9


@pytest.mark.long
def test_a_codec_is_fitted_from_and_to_a_bucket(bucket, tmp_path, recordings) -> None:
    (tmp_path / "codec.yaml").write_text(yaml.safe_dump({"game": to_dict(GAME), "codec": {"width": 8}, "steps": 1}))
    fitted = []
    for source, out in ((recordings, tmp_path / "here"), (f"{bucket}/recordings", f"{bucket}/fitted")):
        args = [str(tmp_path / "codec.yaml"), f"source={source}", f"out={out}", "heldout_every=3", "batch=1"]
        train_codec(load_config(CodecTrainConfig, args))
        fitted.append(load_weights(storage.local(out) / "model.safetensors"))
    assert all(torch.equal(tensor, fitted[1][name]) for name, tensor in fitted[0].items())


def test_a_checkpoint_in_a_bucket_plays_the_same_prompt_and_script(bucket, tmp_path, recordings) -> None:
    checkpoint = newest_checkpoint(f"{bucket}/run")
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        COMPLETE, "ema.safetensors", "model.safetensors", WORLD_FILE,
    ]  # fmt: skip
    write_actions(tmp_path / "actions.csv", GAME.action_space, *draw_frames(GAME, 9, seed=3)[1:])
    s3.upload(tmp_path / "actions.csv", f"{bucket}/actions.csv")
    videos = []
    for folder, run_folder, extra in ((tmp_path, checkpoint, [f"codec={bucket}/codec"]), (bucket, f"{bucket}/run", [])):
        recorded = recordings if folder == tmp_path else f"{bucket}/recordings"
        args = [f"actions={folder}/actions.csv", "frames=9", "steps=1", f"out={folder}/made/demo.mp4", *extra]
        for prompt in (f"{recorded}/episode_00000/video.mp4", f"{folder}/prompt.png"):
            assert run("sampling", VERBS, ["generate", str(run_folder), f"prompt={prompt}", *args]) == 0
            videos.append(storage.read_bytes(f"{folder}/made/demo.mp4"))
            with storage.writing(f"{folder}/prompt.png") as part:
                part.write_bytes(storage.read_bytes(f"{folder}/made/demo.png"))
    assert videos[0] == videos[2]


def test_the_times_of_a_video_in_a_bucket_come_from_its_table(bucket_folder, tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    write_video(tmp_path / "a.mp4", rng.integers(0, 256, (120, 96, 160, 3), dtype=np.uint8), 10.0)
    url, fetched, read = f"{bucket_folder}/a.mp4", [], s3.read
    s3.upload(tmp_path / "a.mp4", url)
    with monkeypatch.context() as patch:
        patch.setattr(s3, "read", lambda *args: fetched.append(data := read(*args)) or data)
        np.testing.assert_allclose(frame_times(url), frame_times(tmp_path / "a.mp4"))
    assert sum(map(len, fetched)) < (tmp_path / "a.mp4").stat().st_size / 2
    local, remote = probe(tmp_path / "a.mp4"), probe(url)
    assert (local.frames, local.height, local.width) == (remote.frames, remote.height, remote.width)
    for start in (0, 7, 55):
        remote, local = (list(read_frames(path, start, start + 3)) for path in (url, tmp_path / "a.mp4"))
        np.testing.assert_array_equal(remote, local)


@pytest.mark.long
def test_a_checkpoint_in_a_bucket_is_judged_alike(bucket, tmp_path, recordings, encoded) -> None:
    few = ["starts=1", "frames=[9]", "held_starts=1", "held_spans=1", "long_s=2", "steps=1", "clips=2"]
    args = [f"recordings={recordings}", f"manifest={encoded}/heldout/manifest.json", f"out={tmp_path}/report"]
    local = str(newest_checkpoint(f"{bucket}/run"))
    assert run("sampling", VERBS, ["evaluate", local, *args, *few, f"codec={bucket}/codec"]) == 0
    put(Path(encoded) / "heldout", f"{bucket}/heldout")
    put(tmp_path / "report", f"{bucket}/other")
    args = [f"recordings={bucket}/recordings", f"manifest={bucket}/heldout/manifest.json", f"out={bucket}/report"]
    assert (
        run("sampling", VERBS, ["evaluate", f"{bucket}/run", *args, *few, f"beside=[{bucket}/other/report.json]"]) == 0
    )
    reports = [json.loads(storage.read_bytes(f"{out}/report/report.json")) for out in (bucket, tmp_path)]
    differing = {"seconds": 0, "settings": 0, "checkpoint": 0}
    assert reports[0] | differing == reports[1] | differing and reports[0]["checkpoint"].startswith(f"{bucket}/run")
    assert b'href="../other/report.html"' in storage.read_bytes(f"{bucket}/report/report.html")
    assert storage.exists(f"{bucket}/report/held.mp4")


def test_official_files_are_imported_from_and_exported_to_a_bucket(bucket, tmp_path) -> None:
    state = random_state(model_of("universal", *SMALL))
    with storage.writing(f"{bucket}/official.safetensors") as file:
        save_weights(state, file)
    args = [*yamls("universal"), *SMALL, f"codec={bucket}/codec"]
    assert model_command("import", f"{bucket}/official.safetensors", *args, f"out={bucket}/imported") == 0
    imported = open_weights(storage.local(f"{bucket}/imported/model.safetensors"))
    assert imported.metadata["source"] == f"{bucket}/official.safetensors"
    assert model_command("export", f"{bucket}/imported", "format=official", f"out={bucket}/back") == 0
    assert same_bits(load_weights(storage.local(f"{bucket}/back/{WEIGHTS_NAME}")), state)
    assert model_command("import", f"{bucket}/back", *args, f"out={bucket}/again") == 0


def test_a_recording_that_is_not_there_is_one_line(s3, tmp_path) -> None:
    write_recording(tmp_path / "episode_00000", GAME)
    with pytest.raises(FileNotFoundError, match="no folder of recordings s3://worlds/nowhere"):
        find_recordings("worldloom", "s3://worlds/nowhere")
    storage.write_text("s3://worlds/broken/episode_00000/actions.csv", "")
    (recording,) = find_recordings("worldloom", "s3://worlds/broken")
    with pytest.raises(FileNotFoundError, match=r"no file s3://worlds/broken/episode_00000/episode\.json"):
        recording.read(GAME)
