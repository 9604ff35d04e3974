"""Encoding into shards: the same bytes whatever happened on the way, and nothing half-written."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from encode_runs import encode_words, read_tree
from full_disk import full_disk
from pages import PLANTED, Page
from PIL import Image
from safetensors.torch import load
from tiny_recordings import write_recording
from webdataset.compat import WebDataset

from configs import storage
from configs.cli import run
from data_pipeline.__main__ import VERBS
from data_pipeline.clips import cut_runs
from data_pipeline.encode import drop_faulty, encode_recordings
from data_pipeline.inspect import PICTURES, VIDEOS
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.worldloom import read_episode
from data_pipeline.shard_set import Shards, read_clips
from data_pipeline.shards import ALIGNMENT, load_manifest
from data_pipeline.verify import verify_set
from data_pipeline.video import probe
from model.codec import load_codec
from tests.bench.loader import write_mapped


def into(config, out, **changes):
    return dataclasses.replace(config, out=str(out), **changes)


def encode_by_hand(config, episode, start, frames):
    video = np.stack(list(read_game_frames(episode, config.game)))[start : start + frames]
    tensor = rearrange(torch.from_numpy(video), "n h w c -> 1 c n h w").float() / 127.5 - 1
    with torch.no_grad():
        return load_codec(config.codec).encode(tensor)[0].bfloat16()


def test_a_clip_holds_the_latents_actions_and_first_frame_of_its_frames(encode_config, encoded):
    """Episode 0, 1, 3 and 4 are for training; each has clips at 0 and 9 of two chunks of 9 frames."""
    clips = read_clips(f"{encoded}/train/manifest.json")
    assert [(clip.episode[-1], clip.start) for clip in clips] == [(e, s) for e in "0134" for s in (0, 9)]
    assert {clip.episode[-1] for clip in read_clips(f"{encoded}/heldout/manifest.json")} == {"2", "5"}
    clip = clips[3]
    episode = read_episode(Path(encode_config.source) / clip.episode, encode_config.game)
    chunks = [encode_by_hand(encode_config, episode, start, 9) for start in (9, 18)]
    assert clip.latents.shape == (16, 6, 4, 6) and clip.latents.dtype == torch.bfloat16
    # Encoded in another batch, the matrix product may round the last bit differently.
    torch.testing.assert_close(clip.latents, torch.cat(chunks, dim=1), atol=0.01, rtol=0.01)
    np.testing.assert_array_equal(clip.keyboard, episode.actions.keyboard[9:27])
    np.testing.assert_array_equal(clip.mouse, episode.actions.mouse[9:27])
    picture = np.asarray(Image.open(io.BytesIO(clip.first_frame))).astype(float)
    assert np.abs(picture - list(episode.frames())[9]).mean() < 3


def test_latents_begin_where_they_are_copied_fast(encoded):
    (path, *_) = sorted(Path(encoded).glob("train/*.tar"))
    with tarfile.open(path) as tar:
        members = [one for one in tar if one.name.endswith(".safetensors")]
        assert members
        for member in members:
            packed = path.read_bytes()[member.offset_data :]
            length = int.from_bytes(packed[:8], "little")
            header = json.loads(packed[8 : 8 + length])
            assert (member.offset_data + 8 + length + header["latents"]["data_offsets"][0]) % ALIGNMENT == 0


def test_continuous_clips_are_encoded_whole(encode_config, tmp_path):
    config = into(encode_config, tmp_path, layout="continuous", clip_frames=13, stride=5)
    encode_recordings(config)
    manifest = load_manifest(tmp_path / "train" / "manifest.json")
    assert (manifest.clip_latents, manifest.clips) == (4, 16)
    clip = read_clips(tmp_path / "train" / "manifest.json", limit=2)[1]
    episode = read_episode(Path(config.source) / clip.episode, config.game)
    torch.testing.assert_close(clip.latents, encode_by_hand(config, episode, 5, 13), atol=0.01, rtol=0.01)


def test_runs_are_cut_where_they_are_wanted():
    frames = (np.full((1, 1, 3), i, np.uint8) for i in range(10))
    runs = [(start, run[:, 0, 0, 0].tolist()) for start, run in cut_runs(frames, [0, 2, 7], 3)]
    assert runs == [(0, [0, 1, 2]), (2, [2, 3, 4]), (7, [7, 8, 9])]


def test_plain_webdataset_reads_the_shards(encoded):
    shards = sorted(str(path) for path in Path(encoded, "train").glob("*.tar"))
    samples = list(WebDataset(shards, shardshuffle=False))
    clips = read_clips(f"{encoded}/train/manifest.json")
    assert [sample["__key__"] for sample in samples] == [f"{clip.episode}-{clip.start:06d}" for clip in clips]
    for sample, clip in zip(samples, clips, strict=True):
        tensors = load(sample["safetensors"])
        assert tensors["latents"].equal(clip.latents) and tensors["start"] == clip.start
        assert sample["jpg"] == clip.first_frame


def test_encoding_again_and_elsewhere_gives_the_same_bytes(encode_config, encoded, tmp_path):
    before = read_tree(encoded)
    assert encode_recordings(encode_config).new_clips == 0
    assert encode_recordings(into(encode_config, tmp_path)).new_clips == 12
    assert read_tree(encoded) == read_tree(tmp_path) == before


SPOILT = {"key": 0, "episode": 1, "start": 2, "offset": 3, "size": 4, "jpeg_offset": 5, "jpeg_size": 6}


def spoil(index, damage):
    """An index that is wrong about its second clip in one word, or has its clips in another order."""
    loaded = json.loads(index.read_text())
    if damage == "order":
        loaded["clips"].reverse()
    else:
        place = SPOILT[damage]
        value = loaded["clips"][1][place]
        loaded["clips"][1][place] = value + (512 if isinstance(value, int) else "x")
    index.write_text(json.dumps(loaded))


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "index", "order", *SPOILT])
def test_a_damaged_shard_is_reported_and_made_anew(damage, encode_config, encoded, game_yaml, tmp_path, capsys):
    shutil.copytree(encoded, tmp_path / "out")
    shard, manifest = tmp_path / "out" / "train" / "shard-000001.tar", str(tmp_path / "out" / "train" / "manifest.json")
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[:-512])
    elif damage == "altered":
        data[3000] ^= 1
        shard.write_bytes(data)
    elif damage == "index":
        shutil.copy(shard.with_name("shard-000000.index.json"), shard.with_name("shard-000001.index.json"))
    else:
        spoil(shard.with_name("shard-000001.index.json"), damage)
    assert run("data_pipeline", VERBS, ["verify", manifest]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "shard-000001" in said[0] and "1 faults" in said[1]
    assert (
        run("data_pipeline", VERBS, ["repair", *encode_words(into(encode_config, tmp_path / "out"), game_yaml)[1:]])
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "shard-000001" in said[0] and "12 clips (2 by this worker)" in said[1]
    assert read_tree(tmp_path / "out") == read_tree(encoded)


def test_verify_and_inspect_speak_of_a_whole_set(encoded, capsys):
    manifest = f"{encoded}/train/manifest.json"
    assert verify_set(manifest) == []
    assert run("data_pipeline", VERBS, ["verify", manifest]) == 0
    assert run("data_pipeline", VERBS, ["inspect", manifest]) == 0
    said = capsys.readouterr().out
    assert "4 shards, 8 clips, no faults" in said and "keys held: forward" in said
    assert run("data_pipeline", VERBS, ["verify", f"{encoded}/nowhere.json"]) == 2
    assert run("data_pipeline", VERBS, ["verify"]) == 2


def test_a_stray_shard_is_reported(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / ".hidden" / "out")
    shutil.copy(tmp_path / ".hidden/out/train/shard-000000.tar", tmp_path / ".hidden/out/train/shard-000009.tar")
    (tmp_path / ".hidden/out/train/.shard-000001.1-ab.tmp.tar").write_bytes(b"of a writer that was killed")
    (fault,) = verify_set(tmp_path / ".hidden/out/train/manifest.json")
    assert "shard-000009.tar: not in the manifest" in fault


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stride": 6}, "stride was 9, is 6"),
        ({"heldout_every": 4}, "heldout_every was 3, is 4"),
        ({"shard_clips": 4}, "shard_clips was 2, is 4"),
    ],
)
def test_another_plan_over_existing_shards_is_refused_by_name(changes, named, encode_config, encoded):
    before = read_tree(encoded)
    with pytest.raises(ValueError, match=named):
        encode_recordings(dataclasses.replace(encode_config, **changes))
    assert read_tree(encoded) == before


def test_shards_without_their_plan_are_refused(encode_config, encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "out")
    (tmp_path / "out/train/plan.json").unlink()
    before = read_tree(tmp_path / "out")
    for config in (into(encode_config, tmp_path / "out"), into(encode_config, tmp_path / "out", clip_frames=9)):
        for action in (encode_recordings, drop_faulty):
            with pytest.raises(
                ValueError, match=r"out/train holds shards without their plan\.json; delete them or give"
            ):
                action(config)
    assert read_tree(tmp_path / "out") == before


def test_a_plan_that_is_written_with_its_first_shard_meanwhile_is_found(encode_config, encoded, tmp_path, monkeypatch):
    """Another worker begins between this one's look at the plan and that at the shards."""
    list_files, config = storage.list_files, into(encode_config, tmp_path / "out")

    def begin_first(folder):
        shutil.copytree(encoded, tmp_path / "out", dirs_exist_ok=True)
        return list_files(folder)

    monkeypatch.setattr(storage, "list_files", begin_first)
    assert encode_recordings(config).new_clips == 0
    with pytest.raises(ValueError, match="stride was 9, is 6"):
        encode_recordings(into(config, tmp_path / "out", stride=6))


def test_other_recordings_or_another_codec_over_existing_shards_are_refused(encode_config, encoded, tmp_path):
    shutil.copytree(encode_config.source, tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / "episode_00001")
    write_recording(tmp_path / "source" / "episode_00001", encode_config.game, seed=77)
    with pytest.raises(ValueError, match=r"episodes episode_00001 was '30 frames .*', is '30 frames"):
        encode_recordings(dataclasses.replace(encode_config, source=str(tmp_path / "source")))
    shutil.copytree(encode_config.codec, tmp_path / "codec")
    weights = bytearray((tmp_path / "codec" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "codec" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="codec_hash was"):
        encode_recordings(dataclasses.replace(encode_config, codec=str(tmp_path / "codec")))


FAULTS = {
    "mistyped key": (["strid=4"], "did you mean 'stride'"),
    "no source": (["source=nowhere"], "no folder of recordings nowhere"),
    "no codec": (["codec=nowhere"], "no codec in nowhere"),
    "no such reader": (["reader=obs"], "reader must be one of worldloom, frames"),
    "frames that are no chunks": (["clip_frames=16"], "multiples of 9"),
    "frames that are no latents": (["layout=continuous", "clip_frames=16"], "1 + 4k frames"),
    "clips longer than the episodes": (["clip_frames=90"], "none of the 4 train episodes"),
    "nothing held out": (["heldout_every=7"], "hold out none"),
    "no fps": (["game.fps=0"], "tiny: fps=0 must be from 0.1 to 1000"),
    "a negative fps": (["game.fps=-17.5"], "must be from 0.1 to 1000"),
    "no height": (["game.height=0"], "height"),
    "a negative width": (["game.width=-16"], "width"),
    "another fps": (["game.fps=30"], "episode.json says 17.5 fps"),
    "another mouse unit": (["game.action_space.mouse_unit_deg=1.0"], "mouse unit 3 deg"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_and_writes_nothing(fault, encode_config, game_yaml, tmp_path, capsys):
    more, message = FAULTS[fault]
    out = tmp_path / "out"
    assert run("data_pipeline", VERBS, encode_words(into(encode_config, out), game_yaml, *more)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
    assert not out.exists()


def test_the_command_line_exits_with_2_and_one_line(encode_config, game_yaml, tmp_path):
    """In a process of its own, with a video that is cut off."""
    shutil.copytree(encode_config.source, tmp_path / "source")
    video = tmp_path / "source" / "episode_00004" / "video.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    config = into(encode_config, tmp_path / "out", source=str(tmp_path / "source"))
    command = [sys.executable, "-m", "data_pipeline", *encode_words(config, game_yaml)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "episode_00004/video.mp4" in done.stderr and not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_shard_and_no_half_episode(encode_config, encoded, game, tmp_path):
    config = into(encode_config, tmp_path / "out")
    with full_disk(15_000), pytest.raises(OSError, match="File too large"):
        encode_recordings(config)
    assert {path.name for path in (tmp_path / "out" / "train").iterdir()} == {"plan.json"}
    assert not list((tmp_path / "out").rglob("*.tmp*"))
    assert encode_recordings(config).new_clips == 12  # room again: it goes on
    assert read_tree(tmp_path / "out") == read_tree(encoded)
    with full_disk(2_000), pytest.raises(OSError, match="File too large"):
        write_recording(tmp_path / "recordings" / "episode", game)
    assert list((tmp_path / "recordings").iterdir()) == []


def test_a_manifest_says_what_is_wrong_with_it(encoded, tmp_path):
    path = tmp_path / "manifest.json"
    whole = json.loads(Path(encoded, "train", "manifest.json").read_text())
    for text, message in [
        (json.dumps({**whole, "shards": []}), "lists no shards"),
        (json.dumps({**whole, "shrds": []}), "manifest.json: .*shrds.*did you mean"),
        (json.dumps({**whole, "layout": "loose"}), "must be one of chunked, continuous"),
        ("[]", "must hold keys and values"),
        ("{", "not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load_manifest(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    os.unlink(path)
    with pytest.raises(FileNotFoundError, match="no manifest"):
        load_manifest(path)


def test_a_sample_reads_so_many_shards_and_compares_the_sizes_of_all(encoded, tmp_path, capsys):
    shutil.copytree(encoded, tmp_path / "out")
    manifest = str(tmp_path / "out/train/manifest.json")
    for shard in (tmp_path / "out/train").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[3000] ^= 1
        shard.write_bytes(data)
    assert len(verify_set(manifest, sample=3)) == 3 and len(verify_set(manifest)) == 4
    assert run("data_pipeline", VERBS, ["verify", manifest, "sample=0"]) == 0
    assert "4 shards, 0 of them read" in capsys.readouterr().out
    (tmp_path / "out/train/shard-000001.tar").write_bytes(b"short")
    assert "truncated or grown" in verify_set(manifest, sample=0)[0]


def test_clips_and_shards_that_are_there_twice_are_reported(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "out")
    url = tmp_path / "out/train/manifest.json"
    for name in ("shard-000000.tar", "shard-000000.index.json"):
        shutil.copy(url.with_name(name), url.with_name(name.replace("0000.", "0007.")))
    index = url.with_name("shard-000007.index.json")
    index.write_text(index.read_text().replace("shard-000000", "shard-000007"))
    loaded = json.loads(url.read_text())
    copy = {**loaded["shards"][0], "url": "shard-000007.tar"}
    url.write_text(json.dumps({**loaded, "shards": [*loaded["shards"], copy, loaded["shards"][3]]}))
    faults = verify_set(url)
    assert len(faults) == 3 and "2 times in the manifest" in faults[2]
    assert all("shard-000007.tar: clip" in fault and "shard-000000.tar too" in fault for fault in faults[:2])


def test_a_page_shows_pictures_actions_and_clips(encoded, encode_config, tmp_path, capsys):
    manifest, out = f"{encoded}/train/manifest.json", tmp_path / "page"
    words = ["inspect", manifest, f"out={out}", f"codec={encode_config.codec}"]
    assert run("data_pipeline", VERBS, words) == 0
    page, clips = (out / "index.html").read_text(), load_manifest(manifest).clips
    assert page.count("<video") == min(VIDEOS, clips) and page.count("data:image/jpeg;base64,") == min(PICTURES, clips)
    assert all(f"<b>{key}</b>" in page for key in encode_config.game.action_space.keys)
    assert all(probe(video).frames == 18 for video in sorted(out.glob("*.mp4")))
    assert f"{out}/index.html" in capsys.readouterr().out
    shutil.copytree(encode_config.codec, tmp_path / "codec")
    weights = tmp_path / "codec" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert run("data_pipeline", VERBS, ["inspect", manifest, f"out={out}", f"codec={tmp_path}/codec"]) == 2
    assert "the set was encoded by" in capsys.readouterr().err


def test_a_page_shows_what_a_manifest_says_as_text_alone(encoded, tmp_path) -> None:
    shutil.copytree(encoded, tmp_path / "set")
    url, planted = tmp_path / "set/train/manifest.json", PLANTED.replace("/", "&").encode(errors="ignore").decode()
    loaded = json.loads(url.read_text())
    loaded["game"]["name"] = loaded["split"] = loaded["codec"] = loaded["game"]["action_space"]["keys"][0] = planted
    url.write_text(json.dumps(loaded))
    assert run("data_pipeline", VERBS, ["inspect", str(url), f"out={tmp_path}/page"]) == 0
    page = Page((tmp_path / "page/index.html").read_text())
    assert page.is_closed_to(planted) and page.text.count("alert(1)") >= 2 * 6 and page.tags.count("title") == 1


def test_the_bench_compares_the_stream_with_the_bare_bytes(encoded, capsys):
    words = ["bench", f"{encoded}/train/manifest.json", "batch=2", "repeats=1", "workers=[0,1]"]
    assert run("data_pipeline", VERBS, words) == 0
    said = capsys.readouterr().out
    rows = ("into one MB", "into memory", "stream, 0 workers", "stream, 1 workers", "mapped safetensors")
    assert all(row in said for row in rows) and "8 of 8 clips" in said
    assert run("data_pipeline", VERBS, [*words[:2], "batch=9"]) == 2
    assert "fewer than batch=9" in capsys.readouterr().err


def test_the_bench_says_where_it_has_no_room(encoded, tmp_path):
    with full_disk(15_000), pytest.raises(OSError, match=r"cannot write 8 clips to .*; set TMPDIR to .* megabytes="):
        write_mapped(Shards(f"{encoded}/train/manifest.json"), 8, tmp_path / "clips.safetensors")


def test_encoding_is_compared_with_its_codec_alone(encode_config, game_yaml, tmp_path, capsys):
    words = ["bench-encode", str(game_yaml), f"source={encode_config.source}", f"codec={encode_config.codec}"]
    words += [f"out={tmp_path / 'latents'}", "shard_clips=2", "heldout_every=3"]
    assert run("data_pipeline", VERBS, words) == 0
    said = capsys.readouterr().out
    assert "codec alone" in said and "% of it" in said and "12 clips, " in said and "waited for frames" in said
    assert run("data_pipeline", VERBS, words) == 2
    assert "holds shards already" in capsys.readouterr().err
