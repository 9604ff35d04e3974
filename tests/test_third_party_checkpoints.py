"""Checkpoints and codecs of others: nothing in their files is resolved, fetched from elsewhere or followed unsaid."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_world import change, write_checkpoint

from configs import save_config, storage
from configs.s3 import upload
from model.codec import CONFIG_FILE, load_codec
from model.world import WORLD_FILE, find_codec, keep_codec, load_world, read_world_config
from train.checkpoint import require_branch

SECRET = "${oc.env:WORLDLOOM_SECRET}"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WORLDLOOM_SECRET", "wJalr")
    return "wJalr"


@pytest.mark.parametrize("key", ["codec", "codec_hash", "game__name", "game__action_space__keys", "patch", "wan"])
def test_a_checkpoint_and_its_codec_cannot_read_the_environment(tmp_path: Path, secret: str, key: str) -> None:
    folder = write_checkpoint(tmp_path)
    if key in ("patch", "wan"):
        (folder.parent / "codec" / CONFIG_FILE).write_text(f"name: {key}\nweights: {SECRET}.pth\n")
    else:
        change(folder / WORLD_FILE, **{key: f"s3://evil/{SECRET}" if "keys" not in key else [SECRET]})
    with pytest.raises(ValueError, match=r"(world|config)\.yaml refers to") as error:
        load_world(folder, codec=str(folder.parent / "codec"))
    assert secret not in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_is_gone_on_from_cannot_read_the_environment(tmp_path: Path, secret: str) -> None:
    (tmp_path / "config.yaml").write_text(f"resume: {SECRET}\n")
    with pytest.raises(ValueError) as error:
        require_branch(str(tmp_path), f"{tmp_path}/{secret[:2]}")
    assert secret not in str(error.value)


@pytest.mark.parametrize("named", ["../Wan2.1_VAE.pth", "/Wan2.1_VAE.pth", "a//b.pth", "..\\b.pth", ""])
@pytest.mark.parametrize("key", ["weights", "tiny_weights"])
def test_a_codec_names_no_weights_outside_of_its_folder(tmp_path: Path, key: str, named: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump({"name": "wan", "decoder": "tiny", key: named}))
    with pytest.raises(ValueError, match="which is no file of a folder") as error:
        load_codec(tmp_path)
    assert CONFIG_FILE in str(error.value)


def test_a_codec_in_another_bucket_is_not_fetched_unsaid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "run")
    shutil.move(tmp_path / "run" / "codec", tmp_path / "elsewhere")
    change(folder / WORLD_FILE, codec="s3://evil/codec")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody there: a request would be another error
    with pytest.raises(
        ValueError, match=r"s3://evil/codec is in another bucket .* codec=s3://evil/codec allows it"
    ) as error:
        load_world(folder)
    assert "\n" not in str(error.value)
    assert load_world(folder, codec=str(tmp_path / "elsewhere"))


def test_no_other_file_than_weights_is_read_as_the_codec_that_a_checkpoint_names(tmp_path: Path) -> None:
    """Some never end, as /proc/kmsg, and a strange name is no reason to refuse a codec that lies beside."""
    folder = write_checkpoint(tmp_path / "run")
    for name in ("/proc/kmsg", "/etc/passwd", "a\0b", "x" * 5000, "\ud800"):
        said = replace(read_world_config(folder), codec=name)
        assert find_codec(folder, said) == str(tmp_path / "run" / "codec")
        with pytest.raises(ValueError, match="give the right one as codec=") as error:
            find_codec(folder, replace(said, codec_hash="another"))
        assert not re.search("(kmsg|passwd) is [0-9a-f]", str(error.value))


def test_a_codec_in_the_bucket_of_its_checkpoint_is_fetched(bucket_folder: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run")
    for name in storage.list_tree(tmp_path / "run" / "codec"):
        upload(tmp_path / "run" / "codec" / name, f"{bucket_folder}/far/from/it/{name}")
    save_config(replace(read_world_config(folder), codec=f"{bucket_folder}/far/from/it"), folder / WORLD_FILE)
    for name in storage.list_tree(folder):
        upload(folder / name, f"{bucket_folder}/a/b/c/step_0000100/{name}")
    shutil.rmtree(tmp_path / "run")
    assert load_world(f"{bucket_folder}/a/b/c")


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_a_run_keeps_a_copy_of_its_codec(bucket_folder: str, tmp_path: Path, place: str) -> None:
    folder, codec = write_checkpoint(tmp_path / "run"), tmp_path / "run" / "codec"
    where = f"{bucket_folder}/codec" if place == "bucket" else str(tmp_path / "mine")
    with storage.writing_folder(where, last="config.yaml") as part:
        shutil.copytree(codec, part, dirs_exist_ok=True)
    change(folder / WORLD_FILE, codec=where)
    shutil.rmtree(codec)
    for _ in range(2):  # it is there the second time
        keep_codec(where, str(tmp_path / "run"))
    storage.remove_folder(where, CONFIG_FILE)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert load_world(tmp_path / "moved")
