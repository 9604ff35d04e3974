"""What two writers, or one that is killed, leave in a folder."""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from full_disk import full_disk
from tiny_recordings import draw_frames, write_recording

from configs import storage
from configs.cli import run
from configs.files import TEMPORARY, atomic_files, atomic_folder, atomic_path, write_text
from configs.lease import sole_writer
from data_pipeline.__main__ import VERBS
from data_pipeline.readers.worldloom import describe_episode, write_episode

DOOM = "configs/games/doom.yaml"
KILLED = """
import os, signal, sys
from configs.files import atomic_files, atomic_folder, atomic_path
with atomic_path(sys.argv[1] + "/film.mp4") as film, atomic_folder(sys.argv[1] + "/episode") as episode:
    with atomic_files(sys.argv[1], "b.png") as pair:
        film.write_text("half")
        (episode / "video.mp4").write_text("half")
        (pair / "a.mp4").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_swept_by_the_next_one_and_nothing_else(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 3 and all(TEMPORARY.fullmatch(name) for name in left)
    machine = re.findall("[0-9a-f]{8}", left[0])[0]
    mine = (
        ".film.tmp.mp4", ".notes.1-ab.tmp.txt", f".other.deadbeef-{os.getpid()}-00000000.tmp",
        f".no-process.{machine}-{10**30}-00000000.tmp",
    )  # fmt: skip
    for name in mine:
        (tmp_path / name).write_text("a person's, or of a machine that may still write it")
    (tmp_path / ".old.deadbeef-1-00000000.tmp").write_text("of a machine that has not touched it for days")
    os.utime(tmp_path / ".old.deadbeef-1-00000000.tmp", (0, 0))
    with atomic_path(tmp_path / "film.mp4") as film:
        film.write_text("whole")
        code = "import sys; from configs.files import write_text; write_text(sys.argv[1], '')"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "beside.txt")], check=True)  # this one lives
        assert film.exists()
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "film.mp4", "beside.txt"}


def test_two_writers_of_an_episode_do_not_touch_each_other_s_files(tmp_path: Path, game) -> None:
    folder = tmp_path / "episode_00000"
    pictures, keyboard, mouse_deg = draw_frames(game, 10, seed=0)

    def frames():  # the other writer begins and ends meanwhile
        yield from pictures[:5]
        write_recording(folder, game, frames=10, seed=1)
        yield from pictures[5:]

    with pytest.raises(FileExistsError, match="is there already; delete it, or give another out="):
        write_episode(folder, {**describe_episode(game, 10), "seed": 0}, frames(), keyboard, mouse_deg)
    assert {path.name for path in folder.iterdir()} == {"video.mp4", "actions.csv", "episode.json"}
    assert json.loads((folder / "episode.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["episode_00000"]


def test_files_that_are_written_together_are_of_one_writer(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(30):
            with atomic_files(tmp_path, "b.png") as folder:
                for name in ("a.mp4", "b.png", "more/c.txt"):
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # of which none may fail either
    texts = {(tmp_path / name).read_text() for name in ("a.mp4", "b.png", "more/c.txt")}
    assert len(texts) == 1 and {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b.png", "more"}


def test_what_cannot_be_written_whole_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("old")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(FileExistsError, match=r"b\.png is a folder"), atomic_files(tmp_path, "b.png") as folder:
        for name in ("a.mp4", "b.png"):
            (folder / name).write_text("new")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.mp4") as part:
        part.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_files(tmp_path, "c.png") as folder:
        (folder / "a.mp4").write_text("new")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "d") as folder:
        raise RuntimeError
    assert (tmp_path / "a.mp4").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("writer", [atomic_path, atomic_folder, lambda place: atomic_files(place, "b.png")])
def test_a_full_disk_is_said_with_what_could_not_be_written(writer, tmp_path: Path) -> None:
    place = tmp_path / "film.mp4"
    with pytest.raises(OSError, match=r"File too large: '.*/film.mp4"), full_disk(10), writer(place) as out:
        file = os.open(out / "x" if out.is_dir() else out, os.O_CREAT | os.O_WRONLY)
        os.write(file, bytes(10))
        os.write(file, bytes(10))
    assert not any(place.rglob("*"))


def test_a_folder_in_which_another_one_records_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    code = "import sys; from configs.lease import sole_writer\nwith sole_writer(sys.argv[1], 'x'): print(); input()"
    words = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin and other.stdout
    other.stdout.readline()
    record = ["record", DOOM, f"out={tmp_path}", "episodes=1", "frames=12"]
    assert run("data_pipeline", VERBS, record) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path} is in use by the record of process {other.pid}" in said
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    other.communicate(b"\n")
    with sole_writer(tmp_path, "record"):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "rec").mkdir()
    (tmp_path / "rec" / ".lock").symlink_to("../precious")
    with pytest.raises(OSError, match=r"/rec/\.lock"), sole_writer(tmp_path / "rec", "record"):
        pass
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize("lacking", ["video.mp4", "actions.csv", "episode.json"])
def test_an_episode_that_is_not_whole_is_not_taken_for_one(lacking: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "episode_00000"
    folder.mkdir()
    for name in {"video.mp4", "actions.csv", "episode.json"} - {lacking}:
        (folder / name).write_text("{}")
    assert run("data_pipeline", VERBS, ["record", DOOM, f"out={tmp_path}", "episodes=1", "frames=12"]) == 2
    assert f"{folder} lacks {lacking}" in capsys.readouterr().err


def test_names_that_are_no_utf8_are_written_to_and_keep_their_bytes_in_a_text(tmp_path: Path) -> None:
    named = tmp_path / os.fsdecode(b"\xff.txt")
    write_text(named, f"# {named}")
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff.txt"]
    assert named.read_bytes() == b"# " + os.fsencode(named)


@pytest.mark.parametrize("name", ["ä" * 125 + ".mp4", "a." + "b" * 253, "." + "a" * 254, "💡" * 63])
def test_the_longest_names_are_written(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_device_or_a_pipe_is_no_place_for_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/null")
    for place in ("/dev/null", "/dev/stdout", "/dev/new.json", tmp_path / "pipe.json", tmp_path / "link.json"):
        with pytest.raises(ValueError, match="is a device or a pipe; give the name of a file"):
            write_text(place, "text")
    assert Path("/dev/null").is_char_device() and not Path("/dev/new.json").exists()


def test_of_a_link_to_a_folder_the_link_alone_is_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    write_text(tmp_path / "precious" / "COMPLETE", "{}")
    (tmp_path / "step_0000001").symlink_to("precious")
    storage.remove_folder(tmp_path / "step_0000001", "COMPLETE")
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "COMPLETE"]
