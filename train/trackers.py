"""wandb and TensorBoard, each in a thread of its own: whatever they raise or wait for, the run goes on."""

import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Full, Queue
from typing import Any, Protocol

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from configs.errors import one_line
from configs.files import write_text
from train.config import TrainConfig

WANDB_ID = "wandb_id"  # file in the run folder
TENSORBOARD = "tensorboard"  # folder in the run folder
STARTING_S = 3.0  # that a run waits for a tracker before it begins
ANSWER_S = 5.0  # that wandb's server has to take a run; also, after which a call that has not ended is said
UPLOAD_S = 5.0  # at the end of a run, for what wandb has not sent yet
CLOSING_S = 10.0  # at the end of a run, for all that a tracker still does; so more than each of those
KEPT = 10_000  # calls that wait for a tracker which does nothing; those that follow are left out

Say = Callable[[str], None]


class Writer(Protocol):
    """What a tracker does; all of it in the tracker's thread."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def show(self, step: int, videos: Mapping[str, Path]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """A writer that cannot stop or hold up the run: its faults are one line each time that they begin, on stderr."""

    def __init__(self, name: str, start: Callable[[Say], Writer], abandon: Callable[[], None] = lambda: None) -> None:
        """`start` makes the writer; `abandon` ends what a writer that did not close has left in this process."""
        self.name, self._abandon = name, abandon
        self._calls: Queue[Callable[[Writer], None] | None] = Queue(KEPT)
        self._ready = threading.Event()  # started, or known to have failed
        self._since: float | None = time.monotonic()  # when the call began that it is busy with
        self._writer: Writer | None = None
        self._said, self._lost = False, 0
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()
        if not self._ready.wait(STARTING_S):
            self.say(f"has not started within {STARTING_S:.0f} s; the run goes on")

    def say(self, text: str) -> None:
        tqdm.write(f"train run: {self.name}: {text}", file=sys.stderr)

    def tell(self, call: Callable[[Writer], None]) -> None:
        """Has the writer do `call` soon. Never waits, never raises."""
        if self._ready.is_set() and self._writer is None:
            return
        if self._ready.is_set() and self._busy_s() > ANSWER_S:
            self._fail(f"takes longer than {ANSWER_S:.0f} s")
        try:
            self._calls.put_nowait(call)
        except Full:
            self._lost += 1

    def close(self) -> None:
        """Lets the writer finish, for a few seconds."""
        with suppress(Full):
            self._calls.put_nowait(None)
        self._thread.join(max(0.0, CLOSING_S - (self._busy_s() if self._ready.is_set() else 0.0)))
        if alive := self._thread.is_alive():
            self.say("does not end, and is left behind; metrics.jsonl has all figures")
        elif self._lost and self._writer is not None:
            self.say(f"{self._lost} calls failed or were left out; metrics.jsonl has all figures")
        if alive or self._lost:
            self._abandon()

    def _busy_s(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _fail(self, why: str) -> None:
        if not self._said:
            self.say(f"{why}; the run goes on, metrics.jsonl has all figures")
        self._said = True

    def _work(self, start: Callable[[Say], Writer]) -> None:
        def begin() -> None:
            self._writer = start(self.say)

        self._guarded(begin)
        self._ready.set()
        if (writer := self._writer) is None:
            return
        while (call := self._calls.get()) is not None:
            self._guarded(lambda call=call: call(writer))
        self._guarded(writer.close)

    def _guarded(self, call: Callable[[], None]) -> None:
        self._since = time.monotonic()
        try:
            call()
            self._said = False  # it works again
        except BaseException as error:  # noqa: BLE001 - other people's code, which may raise anything, SystemExit too
            self._lost += 1
            self._fail(one_line(error)[:300])
        self._since = None


def trackers(config: TrainConfig, start: int) -> list[Tracker]:
    """Those that `config` asks for, of a run that goes on after `start` steps."""
    found = []
    if config.wandb:
        found.append(Tracker("wandb", lambda say: Wandb(config, say), abandon_wandb))
    if config.tensorboard:
        found.append(Tracker("tensorboard", lambda _: Board(Path(config.out) / TENSORBOARD, start)))
    return found


class Wandb:
    """A run at wandb; or, if the server does not take it, its files on this machine, which `wandb sync` takes there."""

    def __init__(self, config: TrainConfig, say: Say) -> None:
        import wandb  # costs a second

        limits = wandb.Settings(
            init_timeout=ANSWER_S,
            finish_timeout=UPLOAD_S,
            finish_timeout_raises=True,
            quiet=True,  # else it asks the server who we are, and waits for that for 10 s
        )
        mode: Any = os.environ.get("WANDB_MODE", "online")
        out = Path(config.out)
        told: dict[str, Any] = {"resume": "allow", "dir": config.out, "config": asdict(config), "settings": limits}
        told |= {"project": config.wandb_project, "name": out.name, "id": _run_id(out / WANDB_ID)}
        try:
            wandb.setup(wandb.Settings(login_timeout=ANSWER_S))  # for whoever is asked for a key
            self.run: Any = wandb.init(**told, mode=mode)
        except Exception as error:  # noqa: BLE001 - wandb has many kinds
            say(f"{one_line(error)[:300]}; the run goes on, without the server")
            with suppress(Exception, SystemExit):
                wandb.teardown()  # the name of the run is taken in its service
            self.run = wandb.init(**told, mode="offline")
        if self.run.offline:
            say(f"its files are kept here: wandb sync {self.run.settings.sync_dir}")
        elif self.run.url:
            say(self.run.url)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def show(self, step: int, videos: Mapping[str, Path]) -> None:
        import wandb

        self.run.log({name: wandb.Video(path) for name, path in videos.items()}, step=step)

    def close(self) -> None:
        import wandb

        place = self.run.settings.sync_dir
        try:
            self.run.finish()
        except TimeoutError as error:
            raise TimeoutError(f"the server did not take all in {UPLOAD_S:.0f} s: wandb sync {place}") from error
        wandb.teardown()  # here, where it may hang, and not when Python ends


def _run_id(place: Path) -> str:
    """The run's name at wandb: one that goes on after a preemption is the same one there."""
    if place.is_file() and re.fullmatch(r"[0-9a-f]{16}", found := place.read_text(errors="replace").strip()):
        return found
    write_text(place, found := secrets.token_hex(8))
    return found


def abandon_wandb() -> None:
    """Ends wandb's own process, and with it whoever waits for it, so that nothing of wandb's waits when Python ends."""

    def tear_down() -> None:
        with suppress(BaseException):
            sys.modules["wandb"].teardown()

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
                child.wait(1)
    left = threading.Thread(target=tear_down, daemon=True)
    left.start()
    left.join(STARTING_S)


class Board:
    """Events for TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not there without its package

        self.board = SummaryWriter(folder, purge_step=start + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()  # so that a run that is killed has said as much here as in metrics.jsonl

    def show(self, step: int, videos: Mapping[str, Path]) -> None:
        for name, path in videos.items():
            with Image.open(path.with_suffix(".png")) as sheet:
                self.board.add_image(name, np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
        self.board.flush()

    def close(self) -> None:
        self.board.close()
