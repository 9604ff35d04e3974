"""Checkpoints that go to other folders and machines find their codec, told by its hash, or say what is missing."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_released import SMALL, model_command, model_of, random_state, yamls
from tiny_world import generate, write_checkpoint, write_codec

from configs import storage
from model.weights import save_weights
from model.world import load_world, read_world_config, writing_world


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with official weights and a codec, which can be deleted, and the settings that import them."""
    config = model_of("universal", *SMALL, "model.vision=none")
    save_weights(random_state(config, "model."), tmp_path / "given" / "official.safetensors")
    write_codec(tmp_path / "given" / "codec")
    settings = [*yamls("universal"), *SMALL, "model.vision=none", f"codec={tmp_path / 'given' / 'codec'}"]
    return tmp_path / "given", [str(tmp_path / "given" / "official.safetensors"), *settings]


@pytest.mark.parametrize("format", ["official", "diffusers"])
def test_what_was_imported_and_what_is_exported_play_elsewhere(tmp_path: Path, official, format: str) -> None:
    source, args = official
    assert model_command("import", *args, f"out={tmp_path / 'world'}") == 0
    exported = ["export", str(tmp_path / "world"), f"format={format}", f"out={tmp_path / 'exported'}"]
    assert model_command(*exported) == 0
    here = load_world(tmp_path / "world").dit.state_dict()
    shutil.rmtree(source)
    for name in ("world", "exported"):
        shutil.copytree(tmp_path / name, tmp_path / "other" / "place" / name)
        shutil.rmtree(tmp_path / name)
        there = load_world(tmp_path / "other" / "place" / name).dit.state_dict()
        assert all(torch.equal(there[key], tensor) for key, tensor in here.items())


def test_nothing_is_written_into_a_folder_that_holds_something(tmp_path: Path, official) -> None:
    source, args = official
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for out in (source, source / "codec"):
        assert model_command("import", *args, f"out={out}") == 2
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


KILLED = """
import os, signal, sys
from model.world import read_world_config, writing_world
with writing_world(sys.argv[2], read_world_config(sys.argv[1]), None) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
WRITTEN = {"model.safetensors", "ema.safetensors", "world.yaml", "COMPLETE"}


def test_a_world_that_is_not_written_to_its_end_is_not_there_and_does_not_refuse_the_next_one(tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(tmp_path / "run"), tmp_path / "out"
    world = read_world_config(checkpoint)
    assert subprocess.run([sys.executable, "-c", KILLED, checkpoint, out]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp*"))) == 1 and not out.exists()
    with pytest.raises(OSError, match="no room"), writing_world(str(out), world, None) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no room")
    assert not out.exists() and not list(tmp_path.glob(".*.tmp*"))
    with writing_world(str(out), world, None) as folder:
        (folder / "model.safetensors").write_bytes(b"whole")
    assert {path.name for path in out.iterdir()} == WRITTEN and not list(tmp_path.glob(".*.tmp*"))


def test_of_two_writers_of_a_world_the_second_one_adds_nothing_to_the_first_one_s(tmp_path: Path) -> None:
    world, out = read_world_config(write_checkpoint(tmp_path / "run")), tmp_path / "out"
    with pytest.raises(FileExistsError, match="is there already"), writing_world(str(out), world, None) as mine:
        with writing_world(str(out), world, None) as theirs:
            (theirs / "model.safetensors").write_bytes(b"theirs")
        (mine / "config.json").write_bytes(b"mine")
    assert {path.name for path in out.iterdir()} == WRITTEN


def test_a_world_is_written_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with writing_world(str(tmp_path / "out"), read_world_config(write_checkpoint(tmp_path / "run")), None) as folder:
        (folder / "model.safetensors").write_bytes(b"whole")
    assert (tmp_path / "out" / "ema.safetensors").read_bytes() == b"whole"


def test_a_codec_is_found_beside_the_checkpoint_and_not_by_its_name_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one in the right place is not taken; `codec=` says where the right one is."""
    folder = write_checkpoint(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved") / folder.name
    assert load_world(moved) and generate(moved, tmp_path) == 0
    shutil.move(tmp_path / "moved" / "codec", tmp_path / "mine")
    other = tmp_path / "moved" / "codec"
    shutil.copytree(tmp_path / "mine", other)
    spoil(other / "model.safetensors")
    capsys.readouterr()
    assert generate(moved, tmp_path) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"codec {read_world_config(moved).codec_hash}" in line and "codec=" in line
    assert generate(moved, tmp_path, f"codec={other}") == 2
    assert generate(moved, tmp_path, f"codec={tmp_path / 'mine'}") == 0


def test_an_export_for_others_needs_no_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "codec")
    assert model_command("export", str(folder), "format=official", f"out={tmp_path / 'out'}") == 0
    assert "note: without a codec" in capsys.readouterr().out


def spoil(file: Path) -> None:
    """Another last byte: a codec of other numbers."""
    data = bytearray(storage.read_bytes(file))
    data[-1] ^= 1
    file.write_bytes(data)
