"""wandb and TensorBoard never stop, hold up or fail a run, whatever they or their servers do."""

import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import psutil
import pytest
from tiny_training import read_metrics

from configs import load_config
from train import trackers
from train.config import TrainConfig
from train.log import Log
from train.trackers import Tracker, serve


@pytest.fixture(params=["silent", "none"])
def server(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes connections and never answers, or none at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if request.param == "silent" else 9
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield


class Notes:
    """A writer that notes the steps it gets; `fault` is what it does then."""

    def __init__(self, fault: Callable[[], object] = lambda: None) -> None:
        self.steps: list[int] = []
        self.fault = fault

    def write(self, step: int, entries: Mapping[str, float | str]) -> None:
        self.fault()
        self.steps.append(step)

    def close(self) -> None: ...


def lines(count: int) -> Iterator[dict]:
    return iter([{"step": step, "loss": 1.0} for step in range(1, count + 1)])


def refuse() -> None:
    raise OSError("no room")


@pytest.fixture
def log(train_words, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Log]:
    """Starts the log of a run with wandb, and writes one line."""
    monkeypatch.setattr(trackers, "CLOSING_S", 60.0)  # what a tracker has to do may take long on a busy machine

    def start() -> Log:
        log = Log(load_config(TrainConfig, [*train_words, f"out={tmp_path}", "wandb=true"]), 0, main=True)
        log.write(1, {"loss": 0.5, "grad_norm": 2.0})
        return log

    return start


def test_a_run_whose_wandb_server_does_not_answer_goes_on_and_keeps_the_files(log, server, tmp_path, capfd) -> None:
    log().close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"grad_norm" in kept.read_bytes()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]
    assert f"wandb sync {kept.parent}" in capfd.readouterr().err


def test_a_wrong_key_is_said_and_the_run_goes_on(log, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "no key")
    log().close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert "WANDB_API_KEY invalid" in capfd.readouterr().err


def test_a_package_that_is_not_there_is_said_and_the_run_goes_on(log, tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    log().close()
    assert "train run: wandb: no wandb here" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_wandb_process_that_is_killed_or_hangs_is_said_and_left(log, tmp_path, monkeypatch, capfd, number) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    started, deadline = log(), time.monotonic() + 60
    service = None
    while service is None and time.monotonic() < deadline:
        children = psutil.Process(started.trackers[0].process.pid).children()
        service = next((one for one in children if one.name() == "wandb-core"), None)
        time.sleep(0.1)
    assert service
    while not list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
        time.sleep(0.1)
    service.send_signal(number)
    started.write(2, {"grad_norm": 1.0})
    monkeypatch.setattr(trackers, "CLOSING_S", 5.0)
    began = time.monotonic()
    started.close()
    assert time.monotonic() - began < 10
    assert not service.is_running() or service.status() == psutil.STATUS_ZOMBIE
    assert "train run: wandb: " in capfd.readouterr().err.replace("its files are kept here", "")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_tracker_that_raises_is_said_once_and_tried_again(capfd) -> None:
    faults = iter([None, refuse, refuse, None, None])
    notes = Notes(lambda: (next(faults) or list)())
    serve("board", lambda: notes, lines(5))
    assert notes.steps == [1, 4, 5] and capfd.readouterr().err.count("no room; the run goes on") == 1


def test_a_tracker_that_exits_the_program_ends_only_itself(capfd) -> None:
    serve("board", lambda: exit("the server is gone"), lines(2))
    assert "the server is gone; the run goes on" in capfd.readouterr().err


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(trackers, "CLOSING_S", 0.3)
    tracker = Tracker("tensorboard", tmp_path, 0, {})
    tracker.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    trackers.close([tracker])
    assert time.monotonic() - began < 3 and tracker.process.poll() is not None
    assert "tensorboard: does not end" in capfd.readouterr().err


def test_a_tracker_ends_with_a_run_that_was_killed(tmp_path) -> None:
    tracker = Tracker("tensorboard", tmp_path, 0, {})
    assert tracker.process.stdin
    tracker.process.stdin.close()  # as the system does it
    assert tracker.process.wait(60) == 0
