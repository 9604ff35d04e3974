"""wandb and TensorBoard, each in a process of its own that reads metrics.jsonl: whatever they do, the run goes on."""

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from configs.errors import one_line
from configs.files import write_text

METRICS = "metrics.jsonl"  # in the run folder, like the two below
WANDB_ID = "wandb_id"
TENSORBOARD = "tensorboard"
POLL_S = 0.5  # between two looks at metrics.jsonl
ANSWER_S = 5.0  # for wandb's server to accept a run
UPLOAD_S = 5.0  # at the end of a run, for what wandb has not sent yet
CLOSING_S = 20.0  # at the end of a run, for everything a tracker still has to do


class Tracker:
    """The process of one tracker, started by the run."""

    def __init__(self, name: str, out: Path, start: int, settings: Mapping[str, Any]) -> None:
        """`name` is a key of WRITERS; the run in the folder `out` has done `start` steps."""
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train.trackers", name, str(out), str(start)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C stops the run, which then closes its trackers
        )
        assert self.process.stdin
        with suppress(OSError):  # it has failed already, and has said so
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Lets it finish for CLOSING_S, then kills it with every process it has started."""
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            say(self.name, "does not end and is killed; metrics.jsonl has all metrics")
            tracker = psutil.Process(self.process.pid)
            for process in (*tracker.children(recursive=True), tracker):
                with suppress(psutil.Error):
                    process.kill()
            self.process.wait()


def say(name: str, text: str) -> None:
    print(f"\ntrain run: {name}: {text}", file=sys.stderr, flush=True)  # the progress line is not ended


class Writer(Protocol):
    """What a tracker does, in its own process."""

    def write(self, step: int, metrics: Mapping[str, float], videos: Mapping[str, Path]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """A run at wandb; if its server does not accept it, files in the run folder for `wandb sync`."""

    def __init__(self, out: Path, start: int, settings: Mapping[str, Any]) -> None:
        import wandb

        limits = wandb.Settings(
            init_timeout=ANSWER_S,
            finish_timeout=UPLOAD_S,
            finish_timeout_raises=True,
            quiet=True,  # otherwise it asks the server who we are, and waits 10 s for that
            console="off",  # this process prints nothing
            x_stats_pid=os.getppid(),  # the run's own use of the machine
        )
        run = {"resume": "allow", "dir": str(out), "settings": limits, "name": out.name, "id": _run_id(out / WANDB_ID)}
        mode: Any = os.environ.get("WANDB_MODE", "online")
        try:
            self.run: Any = wandb.init(**run, **settings, mode=mode)
        except Exception as error:  # noqa: BLE001 - wandb has many kinds
            say("wandb", f"{one_line(error)[:300]}; the run goes on, without the server")
            with suppress(Exception, SystemExit):
                wandb.teardown()  # its service holds the run's name
            self.run = wandb.init(**run, **settings, mode="offline")
        if self.run.offline:
            say("wandb", f"its files are kept here: wandb sync {self.run.settings.sync_dir}")
        elif self.run.url:
            say("wandb", self.run.url)

    def write(self, step: int, metrics: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        import wandb

        self.run.log({**metrics, **{name: wandb.Video(path) for name, path in videos.items()}}, step=step)

    def close(self) -> None:
        try:
            self.run.finish()
        except TimeoutError as error:
            folder = self.run.settings.sync_dir
            raise TimeoutError(f"the server did not take all in {UPLOAD_S:.0f} s: wandb sync {folder}") from error


def _run_id(path: Path) -> str:
    """The run's name at wandb, kept in the run folder so that a resumed run stays the same one there."""
    if path.is_file() and re.fullmatch(r"[0-9a-f]{16}", saved := path.read_text(errors="replace").strip()):
        return saved
    write_text(path, new := secrets.token_hex(8))
    return new


class TensorBoard:
    """Events for TensorBoard. It plays no mp4, so it gets the contact sheet (.png) beside each video."""

    def __init__(self, out: Path, start: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(out / TENSORBOARD, purge_step=start + 1)

    def write(self, step: int, metrics: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        import numpy as np
        from PIL import Image

        for name, value in metrics.items():
            self.events.add_scalar(name, value, step)
        for name, path in videos.items():
            with Image.open(path.with_suffix(".png")) as sheet:
                self.events.add_image(name, np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
        self.events.flush()

    def close(self) -> None:
        self.events.close()


WRITERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Writer]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def follow(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl after step `start` as they are written, until the run closes our stdin or is gone."""
    line, file, ended = "", None, False
    while True:
        if file is None and path.exists():
            file = open(path, encoding="utf-8")  # noqa: SIM115 - until this process ends
        line += file.readline() if file else ""
        if line.endswith("\n"):
            entries, line = json.loads(line), ""
            if entries["step"] > start:
                yield entries
        elif ended:
            return
        elif ended := bool(select.select([sys.stdin], [], [], POLL_S)[0]):
            signal.alarm(int(2 * CLOSING_S))  # the run may be gone, and cannot kill a process that hangs


def serve(name: str, make: Callable[[], Writer], lines: Iterator[dict[str, Any]], out: Path) -> None:
    """Gives a writer every line. A fault is said once each time it begins, and the next line is tried."""
    failed, faulty, writer = 0, False, None
    try:
        writer = make()
        for entries in lines:
            step = entries.pop("step")
            videos = {key: out / value for key, value in entries.items() if isinstance(value, str)}
            metrics = {key: value for key, value in entries.items() if key not in videos}
            try:
                writer.write(step, metrics, videos)
                faulty = False
            except Exception as error:  # noqa: BLE001 - other people's code, which may raise anything
                if not faulty:
                    say(name, f"{one_line(error)[:300]}; the run goes on, metrics.jsonl has all metrics")
                failed, faulty = failed + 1, True
        writer.close()
    except BaseException as error:  # noqa: BLE001 - and may exit
        say(name, f"{one_line(error)[:300]}; the run goes on, metrics.jsonl has all metrics")
    if failed:
        say(name, f"{failed} lines failed; metrics.jsonl has all metrics")


def main(name: str, out: str, start: str) -> None:
    """The process of one tracker: settings as a line of JSON on stdin, which stays open as long as the run lives."""
    settings, folder = json.loads(sys.stdin.readline()), Path(out)
    lines = follow(folder / METRICS, int(start))
    serve(name, lambda: WRITERS[name](folder, int(start), settings), lines, folder)
    os._exit(0)  # wandb sends telemetry when Python ends, and waits half a minute for a server that does not answer


if __name__ == "__main__":
    main(*sys.argv[1:])
