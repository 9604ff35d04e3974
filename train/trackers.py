"""wandb and TensorBoard, each in a process of its own that reads metrics.jsonl: whatever they do, the run goes on."""

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from configs.errors import one_line
from configs.storage import write_text

METRICS, WANDB_ID = "metrics.jsonl", "wandb_id"  # files in the run folder
POLL_S = 0.5  # between two looks at metrics.jsonl
SERVER_S = 5.0  # for wandb's server to accept a run; and at its end, for what has not been sent yet
CLOSING_S = 20.0  # at the end of a run, for everything a tracker still has to do


def start_tracker(name: str, out: Path, start: int, settings: Mapping[str, Any]) -> subprocess.Popen[str]:
    """The process of the tracker `name`, a key of WRITERS, for a run in the folder `out` with `start` steps done. Its
    stdin stays open as long as the run lives."""
    return subprocess.Popen(
        [sys.executable, "-m", "train.trackers", name, str(out), str(start), json.dumps(settings)],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C stops the run, which then closes its trackers
    )


def close_trackers(trackers: Mapping[str, subprocess.Popen[str]]) -> None:
    """Lets all of them finish for CLOSING_S, then kills those that have not, with every process they have started."""
    deadline = time.monotonic() + CLOSING_S
    for tracker in trackers.values():
        assert tracker.stdin
        tracker.stdin.close()
    for name, tracker in trackers.items():
        try:
            tracker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(name, "does not end and is killed; metrics.jsonl has all metrics")
            for process in (*psutil.Process(tracker.pid).children(recursive=True), tracker):
                with suppress(psutil.Error):
                    process.kill()
            tracker.wait()


def say(name: str, text: str) -> None:
    print(f"\ntrain run: {name}: {text}", file=sys.stderr, flush=True)  # the progress line is not ended


class Wandb:
    """A run at wandb; if its server does not accept it, files in the run folder for `wandb sync`."""

    def __init__(self, out: Path, start: int, settings: Mapping[str, Any]) -> None:
        import wandb

        limits = wandb.Settings(
            init_timeout=SERVER_S,
            finish_timeout=SERVER_S,
            finish_timeout_raises=True,
            quiet=True,  # otherwise it asks the server who we are, and waits 10 s for that
            console="off",  # this process prints nothing
            x_stats_pid=os.getppid(),  # the run's own use of the machine
        )
        run = {"resume": "allow", "dir": str(out), "settings": limits, "name": out.name, "id": _run_id(out), **settings}
        mode: Any = os.environ.get("WANDB_MODE", "online")
        self.out, self.video = out, wandb.Video
        try:
            self.run: Any = wandb.init(**run, mode=mode)
        except Exception as error:  # noqa: BLE001 - wandb has many kinds
            say("wandb", f"{one_line(error)[:300]}; the run goes on, without the server")
            with suppress(Exception, SystemExit):
                wandb.teardown()  # its service holds the run's name
            self.run = wandb.init(**run, mode="offline")
        upload = f"wandb sync {self.run.settings.sync_dir}"
        say("wandb", f"{self.run.url or 'offline'}; to send later what its server has not got: {upload}")

    def write(self, step: int, entries: Mapping[str, float | str]) -> None:
        videos = {name: self.video(self.out / value) for name, value in entries.items() if isinstance(value, str)}
        self.run.log({**entries, **videos}, step=step)

    def close(self) -> None:
        self.run.finish()


def _run_id(out: Path) -> str:
    """The run's name at wandb, kept in its folder so that a resumed run stays the same one there."""
    path = out / WANDB_ID
    if not (path.is_file() and re.fullmatch(r"[0-9a-f]{16}", path.read_text(errors="replace").strip())):
        write_text(path, secrets.token_hex(8))
    return path.read_text().strip()


class TensorBoard:
    """Events for TensorBoard. It plays no mp4, so it gets the contact sheet (.png) beside each video."""

    def __init__(self, out: Path, start: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.out, self.events = out, SummaryWriter(out / "tensorboard", purge_step=start + 1)

    def write(self, step: int, entries: Mapping[str, float | str]) -> None:
        for name, value in entries.items():
            if isinstance(value, str):
                with Image.open((self.out / value).with_suffix(".png")) as sheet:
                    self.events.add_image(name, np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
            else:
                self.events.add_scalar(name, value, step)
        self.events.flush()

    def close(self) -> None:
        self.events.close()


WRITERS = {"wandb": Wandb, "tensorboard": TensorBoard}


def follow(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl after step `start` as they are written, until the run closes our stdin or is gone."""
    line, ended = "", False
    path.touch()
    with open(path, encoding="utf-8") as file:
        while True:
            line += file.readline()
            if line.endswith("\n"):
                entries, line = json.loads(line), ""
                if entries["step"] > start:
                    yield entries
            elif ended:
                return
            elif ended := bool(select.select([sys.stdin], [], [], POLL_S)[0]):
                signal.alarm(int(2 * CLOSING_S))  # the run may be gone, and cannot kill a process that hangs


def serve(name: str, make: Callable[[], Any], lines: Iterator[dict[str, Any]]) -> None:
    """Gives a writer every line, whatever it raises; each fault is said once."""
    faults = set()

    def attempt(call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except BaseException as error:  # noqa: BLE001 - other people's code, which may raise anything, SystemExit too
            if (fault := one_line(error)[:300]) not in faults:
                say(name, f"{fault}; the run goes on, metrics.jsonl has all metrics")
            faults.add(fault)

    if writer := attempt(make):
        for entries in lines:
            attempt(writer.write, entries.pop("step"), entries)
        attempt(writer.close)


def main(name: str, out: str, start: str, settings: str) -> None:
    """The process of a tracker."""
    folder = Path(out)
    serve(name, lambda: WRITERS[name](folder, int(start), json.loads(settings)), follow(folder / METRICS, int(start)))
    os._exit(0)  # wandb sends telemetry when Python ends, and waits half a minute for a server that does not answer


if __name__ == "__main__":
    main(*sys.argv[1:])
