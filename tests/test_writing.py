"""What two writers, or one that is killed, leave in a folder."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from full_disk import full_disk

from configs import storage
from configs.cli import run
from configs.files import TEMPORARY, atomic_folder, atomic_path
from configs.lease import sole_writer
from configs.storage import write_text
from data_pipeline.__main__ import VERBS

RECORD = ["record", "configs/games/doom.yaml", "episodes=1", "frames=12"]
KILLED = """
import os, signal, sys
from configs.files import atomic_folder, atomic_path
with atomic_path(sys.argv[1] + "/film.mp4") as film, atomic_folder(sys.argv[1], "b.png") as pair:
    with atomic_folder(sys.argv[1] + "/episode", "video.mp4", new=True) as episode:
        for path in (film, pair / "a.mp4", episode / "video.mp4"):
            path.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_writer_left_is_swept_by_the_next_one_and_nothing_else(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 3 and all(TEMPORARY.fullmatch(name) for name in left)
    machine = re.findall("[0-9a-f]{8}", min(left))[0]
    not_ours = {
        ".notes.tmp", ".notes.1-ab.tmp", f".other.deadbeef-{os.getpid()}-00000000.tmp",  # a machine that may live
        f".no-process.{machine}-{10**30}-00000000.tmp",
    }  # fmt: skip
    for name in (*not_ours, ".old.deadbeef-1-00000000.tmp"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".old.deadbeef-1-00000000.tmp", (0, 0))  # a machine that has not touched it for days
    with atomic_path(tmp_path / "film.mp4") as film:
        film.write_text("whole")
        code = "import sys; from configs.storage import write_text; write_text(sys.argv[1], '')"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "beside.txt")], check=True)  # this one lives
        assert film.exists()
    assert names(tmp_path) == {*not_ours, "film.mp4", "beside.txt"}


def test_files_that_are_written_together_are_of_one_writer(tmp_path: Path) -> None:
    files = ("a.mp4", "b.png", "more/c.txt")

    def write(number: int) -> None:
        for _ in range(30):
            with atomic_folder(tmp_path, "b.png") as folder:
                (folder / "more").mkdir()
                for name in files:
                    (folder / name).write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # of which none may fail either
    assert len({(tmp_path / name).read_text() for name in files}) == 1 and names(tmp_path) == {"a.mp4", "b.png", "more"}


WRITERS = [atomic_path, lambda path: atomic_folder(path, "b.png"), lambda path: atomic_folder(path, "b.png", new=True)]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_written_whole_leaves_what_was_there(writer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_text("old")
    with pytest.raises(RuntimeError), writer(tmp_path / "out") as part:
        (part / "a.mp4" if part.is_dir() else part).write_text("half")
        raise RuntimeError
    (tmp_path / "out" / "b.png").mkdir()
    with pytest.raises(OSError, match="out"), writer(tmp_path / "out") as part:
        for name in ("a.mp4", "b.png") if part.is_dir() else ("",):
            (part / name).write_text("new")
    assert (tmp_path / "out" / "a.mp4").read_text() == "old" and names(tmp_path) == {"out"}


@pytest.mark.parametrize("writer", WRITERS)
def test_an_error_about_a_full_disk_names_the_file(writer, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"File too large: '.*/film.mp4"),
        full_disk(10),
        writer(tmp_path / "film.mp4") as out,
    ):
        file = os.open(out / "x" if out.is_dir() else out, os.O_CREAT | os.O_WRONLY)
        os.write(file, bytes(10))
        os.write(file, bytes(10))
    assert not any((tmp_path / "film.mp4").rglob("*"))


def test_a_folder_in_which_another_one_records_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    code = "import sys; from configs.lease import sole_writer\nwith sole_writer(sys.argv[1], 'x'): print(); input()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline()
    assert run("data_pipeline", VERBS, [*RECORD, f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path} is in use by the record of process {other.pid}" in error
    assert names(tmp_path) == {".lock"}
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
    assert run("data_pipeline", VERBS, [*RECORD, f"out={tmp_path}"]) == 2
    assert f"{folder} lacks {lacking}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [b"\xff.txt", "ä" * 125 + ".mp4", "a." + "b" * 253, "." + "a" * 254, "💡" * 63])
def test_every_name_is_written_and_keeps_its_bytes_in_a_text(name: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    write_text(path, f"# {path}")
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)] and path.read_bytes() == b"# " + os.fsencode(path)


def test_a_device_or_a_pipe_is_no_place_for_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("/dev/null")
    for path in ("/dev/null", "/dev/stdout", "/dev/new.json", tmp_path / "pipe.json", tmp_path / "link.json"):
        with pytest.raises(ValueError, match=f"{path} is a device or a pipe"):
            write_text(path, "text")
    assert Path("/dev/null").is_char_device() and not Path("/dev/new.json").exists()


def test_of_a_link_to_a_folder_the_link_alone_is_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "precious" / "COMPLETE", "{}")
    (tmp_path / "step_0000001").symlink_to("precious")
    storage.remove_folder(tmp_path / "step_0000001", "COMPLETE")
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "COMPLETE"]
