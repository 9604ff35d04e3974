"""wandb and TensorBoard never stop, hold up or fail a run, whatever they or their servers do."""

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import psutil
import pytest
from tiny_training import read_metrics

from configs import load_config
from train import trackers
from train.config import TrainConfig
from train.log import Log
from train.trackers import close_trackers, serve, start_tracker


@pytest.fixture(params=["silent", "none", "wrong key"])
def server(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that takes connections and never answers, or none at all, or a key that it would refuse."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if request.param == "silent" else 9
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "no key" if request.param == "wrong key" else "0" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield request.param


@pytest.fixture
def log(train_args, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Log]:
    """Starts the log of a run with wandb, and writes one line."""
    monkeypatch.setattr(trackers, "CLOSING_S", 60.0)  # what a tracker has to do may take long on a busy machine

    def start() -> Log:
        log = Log(load_config(TrainConfig, [*train_args, f"out={tmp_path}", "wandb=true"]), 0, main=True)
        log.write(1, {"loss": 0.5, "grad_norm": 2.0})
        return log

    return start


def test_a_run_whose_wandb_server_does_not_answer_goes_on_and_keeps_the_files(log, server, tmp_path, capfd) -> None:
    log().close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"grad_norm" in kept.read_bytes()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]
    text = capfd.readouterr().err
    assert f"wandb sync {kept.parent}" in text and ("WANDB_API_KEY invalid" in text or server != "wrong key")


def test_a_package_that_is_not_there_is_said_and_the_run_goes_on(log, tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    log().close()
    assert "train run: wandb: no wandb here" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_wandb_process_that_is_killed_or_hangs_is_said_and_left(log, tmp_path, monkeypatch, capfd, number) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    started, deadline, text = log(), time.monotonic() + 60, ""
    while "wandb sync" not in text:  # where its files are
        assert time.monotonic() < deadline
        time.sleep(0.1)
        text += capfd.readouterr().err
    children = psutil.Process(started.trackers["wandb"].pid).children()
    (service,) = (child for child in children if child.name() == "wandb-core")
    service.send_signal(number)
    started.write(2, {"grad_norm": 1.0})
    monkeypatch.setattr(trackers, "CLOSING_S", 5.0)
    began = time.monotonic()
    started.close()
    assert time.monotonic() - began < 10
    assert not service.is_running() or service.status() == psutil.STATUS_ZOMBIE
    assert "train run: wandb: " in capfd.readouterr().err  # what went wrong
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


class Notes:
    """A writer that has no room for the second and the third step, and exits the program at the sixth."""

    def __init__(self) -> None:
        self.steps: list[int | str] = []

    def write(self, step: int, entries: Mapping[str, float | str]) -> None:
        if step in (2, 3):
            raise OSError("no room")
        if step == 6:
            sys.exit("the server is gone")
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append("closed")


def test_a_tracker_that_raises_or_exits_is_said_once_and_tried_again(capfd) -> None:
    notes = Notes()
    serve("board", lambda: notes, ({"step": step, "loss": 1.0} for step in range(1, 8)))
    text = capfd.readouterr().err
    assert notes.steps == [1, 4, 5, 7, "closed"] and text.count("no room; the run goes on") == 1
    assert "the server is gone; the run goes on" in text
    serve("board", lambda: exit("no server at all"), iter(()))
    assert "no server at all; the run goes on" in capfd.readouterr().err


@pytest.mark.parametrize("hangs", [False, True])
def test_a_tracker_ends_with_its_run_or_is_killed_where_it_hangs(tmp_path, monkeypatch, capfd, hangs: bool) -> None:
    monkeypatch.setattr(trackers, "CLOSING_S", 0.3 if hangs else 60.0)
    tracker, began = start_tracker("tensorboard", tmp_path, 0, {}), time.monotonic()
    if hangs:
        tracker.send_signal(signal.SIGSTOP)
    close_trackers({"tensorboard": tracker})  # its stdin ends, as the system does it for a run that was killed
    assert tracker.poll() == (-signal.SIGKILL if hangs else 0) and time.monotonic() - began < (3 if hangs else 60)
    assert ("tensorboard: does not end" in capfd.readouterr().err) == hangs
