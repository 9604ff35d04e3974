"""wandb and TensorBoard never stop, hold up or fail a run, whatever they or their servers do."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from tiny_training import read_metrics

from configs import load_config
from train import trackers
from train.config import TrainConfig
from train.log import Log
from train.trackers import Tracker

PATIENT_S = 0.3  # in the place of the seconds that a run gives a tracker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STARTING_S", "ANSWER_S", "CLOSING_S"):
        monkeypatch.setattr(trackers, name, PATIENT_S)


@pytest.fixture(params=["silent", "none"])
def server(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes connections and never answers, or none at all."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1] if request.param == "silent" else 9
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield


class Notes:
    """A writer that notes what it is told; `fault` is what it does then."""

    def __init__(self, fault: Callable[[], object] = lambda: None, at_end: Callable[[], object] = lambda: None) -> None:
        self.steps: list[int] = []
        self.fault, self.at_end = fault, at_end

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.fault()
        self.steps.append(step)

    def show(self, step: int, videos: Mapping[str, Path]) -> None: ...

    def close(self) -> None:
        self.at_end()


def refuse() -> None:
    raise OSError("no room")


def never() -> None:
    threading.Event().wait()


def told(tracker: Tracker, steps: int) -> float:
    """The seconds that it takes to tell a tracker of some steps and to close it."""
    began = time.monotonic()
    for step in range(1, steps + 1):
        tracker.tell(lambda writer, step=step: writer.write(step, {"loss": 1.0}))
        time.sleep(0.01)
    tracker.close()
    return time.monotonic() - began


def figures_of(config: TrainConfig) -> Log:
    log = Log(config, 0, main=True)
    log.write(1, {"loss": 0.5, "grad_norm": 2.0})
    return log


def wandb_config(train_words: list[str], out: Path) -> TrainConfig:
    return load_config(TrainConfig, [*train_words, f"out={out}", "wandb=true"])


def test_a_run_whose_wandb_server_does_not_answer_goes_on_and_keeps_the_files(
    train_words, server, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(trackers, "ANSWER_S", 1.0)
    log = figures_of(wandb_config(train_words, tmp_path))
    log.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"grad_norm" in kept.read_bytes() and read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]
    assert f"wandb sync {kept.parent}" in capfd.readouterr().err


def test_a_key_that_is_none_and_a_package_that_is_not_there_are_said_and_the_run_goes_on(
    train_words, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "no key")
    figures_of(wandb_config(train_words, tmp_path / "key")).close()
    assert list(tmp_path.glob("key/wandb/offline-run-*/run-*.wandb"))
    assert "WANDB_API_KEY invalid" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    figures_of(wandb_config(train_words, tmp_path / "package")).close()
    assert "train run: wandb: import of wandb halted" in capfd.readouterr().err


@pytest.mark.parametrize("signal_number", [9, 19])  # killed, and stopped: it hangs
def test_a_wandb_process_that_is_killed_or_hangs_is_said_and_left(
    train_words, tmp_path, monkeypatch, capfd, signal_number: int
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "CLOSING_S", 1.0)
    log = figures_of(wandb_config(train_words, tmp_path))
    (service,) = [one for one in psutil.Process().children() if one.name() == "wandb-core"]
    service.send_signal(signal_number)
    log.write(2, {"loss": 0.4})
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 10 and not service.is_running()
    assert "train run: wandb: " in capfd.readouterr().err.replace("its files are kept here", "")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_tracker_that_raises_is_said_once_and_tried_again(capfd) -> None:
    faults = iter([None, refuse, refuse, None, None])
    notes = Notes(lambda: (next(faults) or list)())
    told(Tracker("board", lambda _: notes), 5)
    said = capfd.readouterr().err
    assert notes.steps == [1, 4, 5] and said.count("no room; the run goes on") == 1 and "2 calls failed" in said


@pytest.mark.parametrize("what", ["start", "call", "end"])
def test_a_tracker_that_hangs_or_leaves_holds_nothing_up(impatient, capfd, what: str) -> None:
    abandoned: list[str] = []
    notes = Notes(never if what == "call" else lambda: None, never if what == "end" else lambda: None)
    tracker = Tracker("board", lambda _: never() if what == "start" else notes, lambda: abandoned.append(what))  # type: ignore
    assert told(tracker, 50) < 3
    assert "board: does not end" in capfd.readouterr().err and abandoned == [what]


def test_a_tracker_that_does_nothing_keeps_no_more_than_so_many_calls(impatient, monkeypatch, capfd) -> None:
    monkeypatch.setattr(trackers, "KEPT", 3)
    gate = threading.Event()
    notes = Notes(gate.wait)
    tracker = Tracker("board", lambda _: notes)
    for step in range(9):
        tracker.tell(lambda writer, step=step: writer.write(step, {}))
        time.sleep(0.01)
    gate.set()
    time.sleep(0.1)
    tracker.close()
    assert notes.steps == [0, 1, 2, 3] and "5 calls failed or were left out" in capfd.readouterr().err


def test_a_tracker_that_exits_the_program_ends_only_itself(capfd) -> None:
    tracker = Tracker("board", lambda _: exit("the server is gone"))
    told(tracker, 2)
    assert "the server is gone; the run goes on" in capfd.readouterr().err
