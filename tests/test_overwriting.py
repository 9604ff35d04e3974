"""No command writes over what it reads, under whatever name."""

import os
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image
from tiny_recordings import write_recording
from tiny_world import GAME, write_checkpoint, write_codec

from configs.cli import run
from configs.errors import UserError
from configs.files import require_other_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, game_yaml: str) -> Path:
    """A folder with something of everything that a command reads; each test has a copy of it."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "run")
    write_codec(folder / "codec")
    write_recording(folder / "rec" / "episode_00000", GAME, frames=10)
    (folder / "lat").mkdir()
    (folder / "lat" / "report.json").write_text("{}")  # a manifest may have any name
    (folder / "lat" / "index.html").write_text("{}")
    Image.new("RGB", (GAME.width, GAME.height), (90, 120, 60)).save(folder / "mine.png")
    shutil.copy(folder / "rec" / "episode_00000" / "video.mp4", folder / "play.mp4")
    shutil.copy(folder / "rec" / "episode_00000" / "actions.csv", folder / "acts.csv")
    shutil.copy("configs/models/smoke.yaml", folder / "model.yaml")
    for name in ("game.yaml", "config.yaml"):
        shutil.copy(game_yaml, folder / name)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(folder)
    os.link("mine.png", "hard.png")
    Path("soft.png").symlink_to("mine.png")
    Path("films").symlink_to(".")
    os.link("acts.csv", "acts.mp4")
    os.link("run/step_0000100/ema.safetensors", "ema.mp4")
    return folder


def refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command ends, with status 2."""
    program, *args = command.split()
    assert run(program, import_module(f"{program}.__main__").VERBS, args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "give" in error and "out=" in error
    return error


GENERATE = "sampling generate run actions=idle frames=1 steps=1 "
IMPORT = "model import codec/model.safetensors model.yaml game.yaml "
EVALUATE = "sampling evaluate run recordings=rec manifest=lat/manifest.json "


@pytest.mark.parametrize(
    ("command", "read"),
    [
        (GENERATE + "prompt=mine.png out=mine.mp4", "mine.png would change prompt=mine.png"),
        (GENERATE + "prompt=play.mp4 out=play.mp4", "play.mp4 would change prompt=play.mp4"),
        (GENERATE + "prompt=./rec/../play.mp4 out=films/films/play.mp4", "play.mp4"),
        (GENERATE + "prompt=mine.png out=hard.mp4", "hard.png would change prompt=mine.png"),
        (GENERATE + "prompt=mine.png out=soft.mp4", "soft.png would change"),
        (GENERATE + "prompt=soft.png out=mine.mp4", "prompt=soft.png"),
        (GENERATE + "prompt=mine.png actions=acts.csv out=acts.mp4", "actions=acts.csv"),
        (GENERATE + "prompt=mine.png out=ema.mp4", "checkpoint=run/step_0000100/ema.safetensors"),
        (EVALUATE + "out=rec/report", "recordings=rec"),
        (EVALUATE + "out=lat beside=[lat/report.json]", "beside=lat/report.json"),
        ("sampling evaluate run recordings=rec manifest=lat/report.json out=lat", "manifest=lat/report.json"),
        ("train consolidate run out=run/step_0000100/world", "checkpoint=run/step_0000100"),
        ("train consolidate run codec=codec out=codec/world", "codec=codec"),
        ("train codec game.yaml source=rec out=rec", "source=rec"),
        ("train codec config.yaml source=rec out=.", "config=config.yaml"),
        (IMPORT + "codec=codec out=codec", "codec=codec/"),
        (IMPORT + "codec=run/codec out=codec", "official weights=codec/model.safetensors"),
        ("model bench model.yaml out=model.yaml", "config=model.yaml"),
        ("data_pipeline encode game.yaml source=rec codec=codec out=rec", "source=rec"),
        ("data_pipeline encode game.yaml source=rec codec=codec out=rec/sub", "source=rec"),
        ("data_pipeline encode game.yaml source=rec/train codec=codec out=rec", "source=rec/train"),
        ("data_pipeline inspect lat/index.html out=lat", "manifest=lat/index.html"),
        ("data_pipeline doctor game.yaml source=rec out=rec/report.json", "source=rec"),
        ("data_pipeline doctor game.yaml source=rec out=game.yaml", "config=game.yaml"),
    ],
)
def test_no_command_writes_over_what_it_reads(
    command: str, read: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    before = contents()
    assert read in refusal(command, capsys) and contents() == before


@pytest.mark.parametrize(
    "command",
    [
        "data_pipeline doctor game.yaml source=rec out=folder.json",
        "model bench model.yaml out=folder.json",
        GENERATE + "prompt=mine.png out=folder.mp4",
    ],
)
def test_a_folder_where_a_file_is_to_be_is_refused_before_the_work(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = command.rpartition("out=")[2]
    (here / out).mkdir()
    assert f"{out} is a folder" in refusal(command, capsys)


def test_what_lies_beside_is_another_file(here: Path) -> None:
    read = {"prompt": "mine.png", "source": "rec", "bucket": "s3://b/rec", "nothing": None}
    require_other_files(["mine.mp4", "recordings", "rec.png", "s3://b/recordings", "s3://b", "nowhere/x", "."], read)
    Path("rec/elsewhere.mp4").symlink_to("../play.mp4")  # a link in a source is part of it
    for out in ("s3://b/rec", "s3://b/rec/", "s3://b/rec/x", "rec/new/x", "films/rec", "rec/elsewhere.mp4"):
        with pytest.raises(UserError, match=f"{out} would change"):
            require_other_files([out], read)
    with pytest.raises(UserError, match="play"):
        require_other_files(["rec/elsewhere.mp4"], {"prompt": "play.mp4"})


def test_a_long_path_is_compared_soon(here: Path) -> None:
    """Following every part of it for every source took minutes."""
    require_other_files(["a/" + "b/" * 1900 + "x"], {"checkpoint": [f"run/{i}" for i in range(20)]})
    with pytest.raises(UserError, match="source=rec"):
        require_other_files(["films/rec/" + "b/" * 1900 + "x"], {"source": "rec"})
