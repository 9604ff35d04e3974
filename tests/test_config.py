"""The one config loader: later words win, and a wrong word is one clear line."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs import load_config, save_config
from configs.files import atomic_path


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    note: str | None = None


def test_later_words_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 1\ninner: {rate: 1e-4, names: [a]}\n")
    config = load_config(Outer, [str(tmp_path / "a.yaml"), "steps=7", "inner.names=[b,c]"])
    assert config == Outer(7, Inner(1e-4, ("b", "c")))


def test_a_saved_config_loads_to_an_equal_one(tmp_path: Path) -> None:
    config = Outer(3, Inner(0.5, ("x",)), "1")
    save_config(config, tmp_path / "c.yaml")
    assert load_config(Outer, [str(tmp_path / "c.yaml")]) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["steps=1", "inner.ratee=2"], "did you mean 'inner.rate'"),
        (["steps=one"], "steps must be of type int"),
        (["steps=1", "inner=3"], "inner holds settings of its own"),
        ([], "'steps' is required"),
        (["steps=1", "stray"], "neither a YAML file nor key=value"),
        (["steps=true"], "steps must be of type int"),
    ],
)
def test_a_wrong_word_is_refused_by_name(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_config(Outer, words)


def test_a_missing_config_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file nowhere\.yaml"):
        load_config(Outer, ["nowhere.yaml"])


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as part:
        part.write_text("half")
        raise RuntimeError("the disk went away")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("program", ["data_pipeline", "model", "sampling", "train", "launch"])
def test_every_program_refuses_an_unknown_verb_in_one_line(program: str) -> None:
    done = subprocess.run([sys.executable, "-m", program, "dance"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "dance" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_whose_streams_are_closed_does_its_work(closed: str, tmp_path: Path) -> None:
    """And no file of its own gets the number of one, into which libraries would then write."""
    code = """
import sys
from tqdm import tqdm
from configs.cli import Verb, run
def work(words):
    with open(words[0], "w") as file:
        tqdm.write("said", file=sys.stderr)
        print("said", file=sys.stdout)
        file.write(str(file.fileno() > 2))
sys.exit(run("x", {"work": Verb(work)}, ["work", sys.argv[1]]))
"""
    done = subprocess.run(["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", code, str(tmp_path / "made")])
    assert done.returncode == 0 and (tmp_path / "made").read_text() == "True"
