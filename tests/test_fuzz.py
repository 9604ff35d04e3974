"""A minute of tests/fuzz.py, always the same inputs; `make test-fuzz` tries ten minutes of others."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzz_targets import Target

from configs.errors import UserError

ROOT = Path(__file__).parent.parent


def test_a_minute_of_damaged_and_hostile_input_ends_in_success_or_one_line() -> None:
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "seconds=60", "seed=0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def _raise(folder: Path, rng: object) -> None:
    raise KeyError("a fault of ours")


def _leave_half(folder: Path, rng: object) -> None:
    Path("made.txt").write_text("half")
    raise UserError("the other half is missing")


def _fill_memory(folder: Path, rng: object) -> None:
    np.ones(300 * 2**20, np.uint8)


WRONG = {
    "traceback": _raise,
    "a write outside": lambda folder, rng: (folder.parent / "outside" / "x").write_text("") and None,
    "a file that was given": lambda folder, rng: (folder / "a.txt").write_text("changed") and None,
    "left after an error": _leave_half,
    "more than": _fill_memory,
}


@pytest.mark.parametrize("outcome", WRONG)
def test_what_may_not_happen_is_seen(outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "MEMORY_GIB", 0.2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good" / "planted").mkdir(parents=True)
    (tmp_path / "good" / "planted" / "a.txt").write_text("good")
    target = Target("planted", lambda folder: None, WRONG[outcome], lambda path: False)
    assert fuzz.try_one(target, 0, tmp_path, []).outcome.startswith(outcome)
