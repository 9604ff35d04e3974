"""Encoding into shards: the same bytes whatever happened on the way, and nothing half-written."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from encode_runs import encode_args
from full_disk import full_disk
from pages import PLANTED, Page
from PIL import Image
from safetensors.torch import load
from tiny_recordings import write_recording
from tiny_shards import alter, data, edit, read_clips, read_tree
from webdataset.compat import WebDataset

from configs import storage
from data_pipeline.clips import cut_runs
from data_pipeline.encode import drop_faulty, encode
from data_pipeline.inspect import PICTURES, VIDEOS
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.worldloom import read_episode
from data_pipeline.shards import ALIGNMENT, load_manifest, read_index
from data_pipeline.verify import verify_set
from data_pipeline.video import probe
from model.codec import load_codec


@pytest.fixture
def config(encode_config, tmp_path):
    """The settings that made `encoded`, into a folder that is not there."""
    return replace(encode_config, out=str(tmp_path / "out"))


@pytest.fixture
def out(encoded, tmp_path):
    """A copy of both sets, to be spoilt; `config` goes on there."""
    return Path(shutil.copytree(encoded, tmp_path / "out"))


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
    shard = Path(encoded, "train/shard-000000.tar")
    for entry in read_index(str(shard)).entries:
        packed = shard.read_bytes()[entry.offset :]
        length = int.from_bytes(packed[:8], "little")
        latents = json.loads(packed[8 : 8 + length])["latents"]
        assert (entry.offset + 8 + length + latents["data_offsets"][0]) % ALIGNMENT == 0


def test_continuous_clips_are_encoded_whole(config):
    config = replace(config, layout="continuous", clip_frames=13, stride=5)
    (url, _) = encode(config).manifests
    assert (load_manifest(url).clip_latents, load_manifest(url).clips) == (4, 16)
    clip = read_clips(url, limit=2)[1]
    episode = read_episode(Path(config.source) / clip.episode, config.game)
    torch.testing.assert_close(clip.latents, encode_by_hand(config, episode, 5, 13), atol=0.01, rtol=0.01)


def test_runs_are_cut_where_they_are_wanted_and_frames_do_not_end_before():
    frames = (np.full((1, 1, 3), i, np.uint8) for i in range(10))
    runs = [(start, run[:, 0, 0, 0].tolist()) for start, run in cut_runs(frames, [0, 2, 7], 3)]
    assert runs == [(0, [0, 1, 2]), (2, [2, 3, 4]), (7, [7, 8, 9])]
    with pytest.raises(ValueError, match="from frame 2 on"):
        list(cut_runs(iter(np.zeros((4, 1, 1, 3))), [0, 2], 3))


def test_plain_webdataset_reads_the_shards(encoded):
    shards = sorted(str(path) for path in Path(encoded, "train").glob("*.tar"))
    samples = list(WebDataset(shards, shardshuffle=False))
    clips = read_clips(f"{encoded}/train/manifest.json")
    assert [sample["__key__"] for sample in samples] == [f"{clip.episode}-{clip.start:06d}" for clip in clips]
    for sample, clip in zip(samples, clips, strict=True):
        tensors = load(sample["safetensors"])
        assert tensors["latents"].equal(clip.latents) and tensors["start"] == clip.start
        assert sample["jpg"] == clip.first_frame


def test_encoding_again_and_elsewhere_gives_the_same_bytes_and_a_python_caller_the_result(
    encode_config, encoded, config, capsys
):
    before = read_tree(encoded)
    again, elsewhere = encode(encode_config), encode(config)
    assert read_tree(encoded) == read_tree(config.out) == before
    assert (again.clips, again.new_clips, again.bytes, elsewhere.new_clips, elsewhere.shards) == (12, 0, 0, 12, 6)
    assert elsewhere.manifests == tuple(f"{config.out}/{split}/manifest.json" for split in ("train", "heldout"))
    assert elsewhere.bytes == sum(shard.stat().st_size for shard in Path(config.out).glob("*/*.tar"))
    assert capsys.readouterr().out == ""


INDEX_NUMBERS = {"key": 0, "episode": 1, "start": 2, "offset": 3, "size": 4, "jpeg_offset": 5, "jpeg_size": 6}


def spoil(shard, damage):
    """Damages a shard, or its index: wrong about the second clip in one of its numbers, or with the clips reversed."""
    index = shard.with_name(f"{shard.stem}.index.json")
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif damage == "altered":
        alter(shard)
    elif damage == "index":
        shutil.copy(shard.with_name("shard-000000.index.json"), index)
    elif damage == "order":
        edit(index, lambda i: i["clips"].reverse())
    else:
        number = INDEX_NUMBERS[damage]
        edit(index, lambda i: i["clips"][1].__setitem__(number, i["clips"][1][number] + ("x" if number < 2 else 512)))


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "index", "order", *INDEX_NUMBERS])
def test_a_damaged_shard_is_reported_and_made_again(damage, config, encoded, game_yaml, out, capsys):
    spoil(out / "train" / "shard-000001.tar", damage)
    fault, last = data(capsys, "verify", out / "train" / "manifest.json", status=1)
    assert "shard-000001" in fault and "1 faults" in last
    fault, last = data(capsys, *encode_args(config, game_yaml, verb="repair"))
    assert "shard-000001" in fault and "12 clips (2 by this worker)" in last
    assert read_tree(out) == read_tree(encoded)


def test_verify_and_inspect_speak_of_a_whole_set(encoded, capsys):
    manifest = f"{encoded}/train/manifest.json"
    assert "4 shards, 8 clips, no faults" in data(capsys, "verify", manifest)[0]
    assert any("keys held: forward" in line for line in data(capsys, "inspect", manifest))
    data(capsys, "verify", f"{encoded}/nowhere.json", status=2)
    data(capsys, "verify", status=2)


def test_a_stray_shard_is_reported(encoded, tmp_path):
    train = Path(shutil.copytree(encoded, tmp_path / ".hidden" / "out")) / "train"
    shutil.copy(train / "shard-000000.tar", train / "shard-000009.tar")
    (train / ".shard-000001.1-ab.tmp.tar").write_bytes(b"of a writer that was killed")
    (fault,) = verify_set(train / "manifest.json")
    assert "shard-000009.tar: not in the manifest" in fault


@pytest.mark.parametrize(("setting", "value"), [("stride", 6), ("heldout_every", 4), ("shard_clips", 4)])
def test_another_plan_over_existing_shards_is_refused_by_name(setting, value, encode_config, encoded):
    before = read_tree(encoded)
    with pytest.raises(ValueError, match=rf"{setting} was {getattr(encode_config, setting)}, is {value}"):
        encode(replace(encode_config, **{setting: value}))
    assert read_tree(encoded) == before


@pytest.mark.parametrize("action", [encode, drop_faulty])
@pytest.mark.parametrize("clip_frames", [18, 9])
def test_shards_without_their_plan_are_refused(clip_frames, action, config, out):
    (out / "train/plan.json").unlink()
    before = read_tree(out)
    with pytest.raises(ValueError, match=r"out/train holds shards without their plan\.json"):
        action(replace(config, clip_frames=clip_frames))
    assert read_tree(out) == before


def test_a_plan_that_is_written_with_its_first_shard_meanwhile_is_found(config, encoded, monkeypatch):
    """Another worker begins between this one's look at the plan and that at the shards."""
    list_folder = storage.list_folder

    def begin_first(folder):
        shutil.copytree(encoded, config.out, dirs_exist_ok=True)
        return list_folder(folder)

    monkeypatch.setattr(storage, "list_folder", begin_first)
    assert encode(config).new_clips == 0
    with pytest.raises(ValueError, match="stride was 9, is 6"):
        encode(replace(config, stride=6))


def test_other_recordings_or_another_codec_over_existing_shards_are_refused(encode_config, encoded, tmp_path):
    shutil.copytree(encode_config.source, tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / "episode_00001")
    write_recording(tmp_path / "source" / "episode_00001", encode_config.game, seed=77)
    with pytest.raises(ValueError, match=r"episodes.episode_00001 was '30 frames .*', is '30 frames"):
        encode(replace(encode_config, source=str(tmp_path / "source")))
    alter(Path(shutil.copytree(encode_config.codec, tmp_path / "codec")) / "model.safetensors", byte=-1)
    with pytest.raises(ValueError, match="codec_hash was"):
        encode(replace(encode_config, codec=str(tmp_path / "codec")))


FAULTS = {
    "mistyped key": (["strid=4"], "did you mean 'stride'"),
    "no source": (["source=nowhere"], "no folder of recordings nowhere"),
    "no codec": (["codec=nowhere"], "no codec in nowhere"),
    "no such reader": (["reader=obs"], "reader must be one of worldloom, frames"),
    "frames that are no chunks": (["clip_frames=16"], "a multiple of 9"),
    "frames that are no latents": (["layout=continuous", "clip_frames=16"], "1 + 4k frames"),
    "clips longer than the episodes": (["clip_frames=90"], "none of the 4 train episodes"),
    "nothing held out": (["heldout_every=7"], "holds out none"),
    "no fps": (["game.fps=0"], "fps=0"),
    "no height": (["game.height=0"], "height"),
    "another fps": (["game.fps=30"], "runs at 17.5 fps"),
    "another mouse unit": (["game.action_space.mouse_unit_deg=1.0"], "mouse unit 3 deg"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_and_writes_nothing(fault, config, game_yaml, capsys):
    more, message = FAULTS[fault]
    (line,) = data(capsys, *encode_args(config, game_yaml, *more), status=2)
    assert message in line and not Path(config.out).exists()


def test_a_full_disk_leaves_no_half_shard_and_no_half_episode(config, encoded, game, tmp_path):
    out = Path(config.out)
    with full_disk(15_000), pytest.raises(OSError, match="File too large"):
        encode(config)
    assert {path.name for path in (out / "train").iterdir()} == {"plan.json"}
    assert not list(out.rglob("*.tmp*"))
    assert encode(config).new_clips == 12  # room again: it goes on
    assert read_tree(out) == read_tree(encoded)
    with full_disk(2_000), pytest.raises(OSError, match="File too large"):
        write_recording(tmp_path / "recordings" / "episode", game)
    assert list((tmp_path / "recordings").iterdir()) == []


def test_a_sample_reads_so_many_shards_and_compares_the_sizes_of_all(copied, capsys):
    manifest = copied / "manifest.json"
    for shard in copied.glob("*.tar"):
        alter(shard)
    assert len(verify_set(manifest, sample=3)) == 3 and len(verify_set(manifest)) == 4
    assert "4 shards, 0 of them read" in data(capsys, "verify", manifest, "sample=0")[0]
    (copied / "shard-000001.tar").write_bytes(b"short")
    assert "truncated or grown" in verify_set(manifest, sample=0)[0]


def test_clips_and_shards_that_are_there_twice_are_reported(copied):
    for name in ("shard-000000.tar", "shard-000000.index.json"):
        shutil.copy(copied / name, copied / name.replace("0000.", "0007."))
    edit(copied / "shard-000007.index.json", lambda i: i["shard"].update(url="shard-000007.tar"))
    twice = {**json.loads((copied / "manifest.json").read_text())["shards"][0], "url": "shard-000007.tar"}
    edit(copied / "manifest.json", lambda m: m["shards"].append(twice))
    faults = verify_set(copied / "manifest.json")
    assert len(faults) == 2 and all(
        "shard-000007.tar: clip" in fault and "shard-000000.tar too" in fault for fault in faults[:2]
    )


def test_a_page_shows_pictures_actions_and_clips(encoded, encode_config, tmp_path, capsys):
    manifest, out = f"{encoded}/train/manifest.json", tmp_path / "page"
    assert data(capsys, "inspect", manifest, f"out={out}", f"codec={encode_config.codec}")[-1] == f"{out}/index.html"
    page, clips = (out / "index.html").read_text(), load_manifest(manifest).clips
    assert page.count("<video") == min(VIDEOS, clips) and page.count("data:image/jpeg;base64,") == min(PICTURES, clips)
    assert all(f"<b>{key}</b>" in page for key in encode_config.game.action_space.keys)
    assert all(probe(video).frames == 18 for video in sorted(out.glob("*.mp4")))
    weights = Path(shutil.copytree(encode_config.codec, tmp_path / "codec")) / "model.safetensors"
    alter(weights, byte=-1)
    (line,) = data(capsys, "inspect", manifest, f"out={out}", f"codec={tmp_path}/codec", status=2)
    assert "the set was encoded by" in line


def test_a_page_shows_what_a_manifest_says_as_text_alone(copied, tmp_path, capsys) -> None:
    url, planted = copied / "manifest.json", PLANTED.replace("/", "&").encode(errors="ignore").decode()
    edit(url, lambda m: (m.update(split=planted, codec=planted), m["game"].update(name=planted)))
    edit(url, lambda m: m["game"]["action_space"]["keys"].__setitem__(0, planted))
    data(capsys, "inspect", url, f"out={tmp_path}/page")
    page = Page((tmp_path / "page/index.html").read_text())
    assert page.is_closed_to(planted) and page.text.count("alert(1)") >= 2 * 6 and page.tags.count("title") == 1


def test_the_bench_compares_the_stream_with_the_bare_bytes(encoded, capsys):
    args = ["bench", f"{encoded}/train/manifest.json", "repeats=1", "workers=[0,1]"]
    printed = "\n".join(data(capsys, *args, "batch=2"))
    rows = ("into one MB", "into memory", "stream, 0 workers", "stream, 1 workers", "mapped safetensors")
    assert all(row in printed for row in rows) and "8 of 8 clips" in printed
    assert "batch=9" in data(capsys, *args, "batch=9", status=2)[0]


def test_encoding_is_compared_with_its_codec_alone(config, game_yaml, capsys):
    args = encode_args(config, game_yaml, verb="bench-encode")
    printed = "\n".join(data(capsys, *args))
    assert "codec alone" in printed and "% of it" in printed and "12 clips, " in printed
    assert "holds shards already" in data(capsys, *args, status=2)[0]
