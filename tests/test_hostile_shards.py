"""Manifests, plans, indexes and shards that others wrote: each fault is one line that names its file."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encode_runs import encode_args
from safetensors.torch import load_file, save_file
from tiny_shards import data, edit, read_clips

from data_pipeline import shards
from data_pipeline.encode import encode
from data_pipeline.shards import load_manifest, pack_clip, save_manifest, write_shard
from data_pipeline.stream import Stream
from data_pipeline.types import Clip
from data_pipeline.verify import verify_set

DEEP = "[" * 200_000


MANIFESTS = {
    "clips of fewer than no frames": lambda m: m.update(clip_frames=-9),
    "a million million latents": lambda m: m.update(clip_latents=10**9),
    "a layout that the frames do not have": lambda m: m.update(layout="continuous"),
    "no layout": lambda m: m.update(layout="loose"),
    "no shards": lambda m: m.update(shards=[]),
    "a shard twice": lambda m: m["shards"].append(m["shards"][0]),
    "no deviation": lambda m: m.update(latent_std=[0.0] * 16),
    "no means": lambda m: m.update(latent_mean=[]),
    "no channels": lambda m: m.update(latent_channels=0, latent_mean=[], latent_std=[]),
    "a name that leaves the folder": lambda m: m["shards"][0].update(url="../train/shard-000000.tar"),
    "an absolute name": lambda m: m["shards"][0].update(url="/etc/passwd"),
    "a name in another folder": lambda m: m["shards"][0].update(url="a/shard-000000.tar"),
    "a name that is no text": lambda m: m["shards"][0].update(url="\ud800.tar"),
    "a name with a NUL": lambda m: m["shards"][0].update(url="a\0.tar"),
    "fewer than no clips": lambda m: m["shards"][0].update(clips=-1),
    "more clips than fit in memory": lambda m: m["shards"][0].update(clips=10**13, bytes=10**18),
    "shards that are no list": lambda m: m.update(shards={"0": 1}),
    "a shard that is a number": lambda m: m.update(shards=[1]),
    "a game that is null": lambda m: m.update(game=None),
    "a setting nobody knows": lambda m: m.update(clip_frame=9),
}


@pytest.mark.parametrize("verb", ["verify", "inspect", "bench"])
@pytest.mark.parametrize("fault", MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_one_line(fault, verb, copied, capsys):
    edit(copied / "manifest.json", MANIFESTS[fault])
    assert f"{copied}/manifest.json" in data(capsys, verb, copied / "manifest.json", status=2)[0]


NO_JSON = [DEEP, '{"a":' * 200_000, "\xff", "", "3", '"text"', "null", "[]", '{"clip_frames": 1e999}', "{" + "9" * 5000]


@pytest.mark.parametrize("text", NO_JSON)
def test_a_manifest_an_index_and_a_plan_that_are_none_are_one_line(text, encode_config, encoded, tmp_path, capsys):
    out, text = Path(shutil.copytree(encoded, tmp_path / "out")), text.encode("latin-1")
    for name in ("shard-000000.index.json", "manifest.json"):
        (out / "train" / name).write_bytes(text)
        for verb in ("verify", "inspect"):
            status = 1 if verb == "verify" and name != "manifest.json" else 2
            assert f"{out}/train/{name}" in data(capsys, verb, out / "train/manifest.json", status=status)[0]
    (out / "train/plan.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"out/train/plan\.json") as error:
        encode(replace(encode_config, out=str(out)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_shard_may_be_a_link_to_where_its_bytes_lie(copied, tmp_path):
    shutil.move(copied / "shard-000001.tar", tmp_path / "blob")
    (copied / "shard-000001.tar").symlink_to("../blob")
    assert verify_set(copied / "manifest.json") == []


INDEXES = {
    "a clip of 10^12 bytes": lambda i: i["clips"][0].__setitem__(4, 10**12),
    "a clip behind the end": lambda i: i["clips"][0].__setitem__(3, 10**9),
    "a clip in front of the beginning": lambda i: i["clips"][0].__setitem__(3, -512),
    "an offset that is a text": lambda i: i["clips"][0].__setitem__(3, "512"),
    "an offset with a fraction": lambda i: i["clips"][0].__setitem__(3, 512.0),
    "an episode that is null": lambda i: i["clips"][0].__setitem__(1, None),
    "a clip that is a number": lambda i: i["clips"].__setitem__(0, 7),
    "a clip with too few numbers": lambda i: i["clips"][0].pop(),
    "clips that are null": lambda i: i.update(clips=None),
    "clips that are a number": lambda i: i.update(clips=3),
    "a shard that is a list": lambda i: i.update(shard=[]),
    "no shard": lambda i: i.pop("shard"),
    "what was left out, a number": lambda i: i.update(left_out=5),
}


@pytest.mark.parametrize("fault", INDEXES)
def test_an_index_that_is_wrong_is_one_line(fault, copied, capsys):
    edit(copied / "shard-000000.index.json", INDEXES[fault])
    for verb, status in (("verify", 1), ("inspect", 2), ("bench", 2)):
        line = data(capsys, verb, copied / "manifest.json", status=status)[0]
        assert f"{copied}/shard-000000.index.json" in line


def spoil_header(data: bytes, header: bytes) -> bytes:
    """A packed clip with another header, as long as before."""
    length = int.from_bytes(data[:8], "little")
    return data[:8] + header[:length].ljust(length) + data[8 + length :]


def latents(dtype: object = "BF16", shape: object = [1], offsets: object = [0, 2]) -> bytes:
    return json.dumps({"latents": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HEADERS = {
    "nested": b'{"a":' + b"[" * 5000,
    "no JSON": b"{",
    "a list": b"[]",
    "a tensor that is a number": b'{"latents": 3}',
    "a dtype that is a list": latents(dtype=[]),
    "a negative shape": latents(shape=[-1, -1]),
    "a shape of texts": latents(shape=["x"]),
    "a shape of fractions": latents(shape=[1.0]),
    "a huge shape": latents(shape=[10**30]),
    "offsets that are a text": latents(offsets="x"),
    "no offsets": b'{"latents": {"dtype": "BF16", "shape": [1]}}',
}


def rewrite(copied: Path, change: Callable[[Clip], Clip], spoil: Callable[[bytes], bytes] = bytes) -> None:
    """Writes shard 0 again, as an encoder would, with its clips changed and what is packed of them spoilt."""
    manifest = load_manifest(copied / "manifest.json")
    clips = read_clips(copied / "manifest.json", limit=manifest.shards[0].clips)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "pack_clip", lambda clip: spoil(pack_clip(clip)))
        info = write_shard(f"{copied}/shard-000000.tar", [change(clip) for clip in clips])
    save_manifest(replace(manifest, shards=(info, *manifest.shards[1:])), copied / "manifest.json")


def require_one_line(copied: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Verifying, inspecting and streaming end with one line that names the shard and has `text`."""
    for verb, status in (("verify", 1), ("inspect", 2)):
        line = data(capsys, verb, copied / "manifest.json", status=status)[0]
        assert f"{copied}/shard-000000.tar" in line and text in line
    with pytest.raises(ValueError, match=f"{copied}/shard-000000.tar.*{text}"):
        Stream(copied / "manifest.json", batch=8, seed=0, workers=0).batch_at(0)


@pytest.mark.parametrize("fault", HEADERS)
def test_a_clip_with_a_hostile_header_is_one_line(fault, copied, capsys):
    rewrite(copied, replace, lambda packed: spoil_header(packed, HEADERS[fault]))
    require_one_line(copied, capsys, "")


@pytest.mark.parametrize("name", ["latents", "keyboard", "mouse"])
def test_clips_of_another_size_than_the_manifest_says_are_one_line(name, copied, capsys):
    rewrite(copied, lambda clip: replace(clip, **{name: getattr(clip, name)[..., :1].contiguous()}))
    require_one_line(copied, capsys, "has the shapes")


@pytest.mark.parametrize(
    ("name", "value"), [("latents", "nan"), ("latents", "inf"), ("mouse", "inf"), ("keyboard", "nan")]
)
def test_verify_finds_values_that_are_not_finite(name, value, copied, capsys):
    def change(clip: Clip) -> Clip:
        values = getattr(clip, name).clone()
        values.view(-1)[3] = float(value)
        return replace(clip, **{name: values})

    rewrite(copied, change)
    line = data(capsys, "verify", copied / "manifest.json", status=1)[0]
    assert f"shard-000000.tar: episode_00000-000000 has {name} that are not finite" in line


def test_a_plan_that_says_nothing_of_something_is_another_plan(encode_config, encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "out")
    edit(tmp_path / "out/train/plan.json", lambda p: p["game"]["inputs"].update(nothing=None))
    with pytest.raises(ValueError, match=r"game\.inputs\.nothing was None, is None"):
        encode(replace(encode_config, out=str(tmp_path / "out")))


SIZES = ["clip_frames=9000000000000", "batch=1000000000", "stride=1000000000000", "shard_clips=0", "stride=-1"]


@pytest.mark.parametrize("arg", [*SIZES, "workers=[1000000000]", "repeats=1000000000000"])
def test_sizes_have_bounds(arg, encode_config, encoded, game_yaml, capsys):
    bench = ["bench", f"{encoded}/train/manifest.json", arg]
    args = encode_args(encode_config, game_yaml, arg) if arg in SIZES else bench
    assert arg.partition("=")[0] in data(capsys, *args, status=2)[0]


@pytest.mark.parametrize("out", ["{source}", "{source}/sub", "{source}/../{name}/a/b", "s3://raw/doom/latents"])
def test_shards_do_not_go_among_the_recordings(out, encode_config):
    source = "s3://raw/doom" if out.startswith("s3:") else encode_config.source
    config = replace(encode_config, source=source, out=out.format(source=source, name=Path(source).name))
    with pytest.raises(ValueError, match=r"source=.* give another out="):
        encode(config)


def test_a_codec_that_makes_no_numbers_is_refused(encode_config, tmp_path):
    shutil.copytree(encode_config.codec, tmp_path / "codec")
    path = tmp_path / "codec" / "model.safetensors"
    weights = {name: torch.full_like(tensor, 3e38) for name, tensor in load_file(path).items()}
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"codec=.* makes latents of episode_0000\d.* not finite"):
        encode(replace(encode_config, codec=str(tmp_path / "codec"), out=str(tmp_path / "out")))
    assert not list((tmp_path / "out").rglob("*.tar"))
