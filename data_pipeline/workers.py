"""Worker processes with a game each, which end with their game and with the program that started them."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from configs.errors import UserError

SPAWN = multiprocessing.get_context("spawn")
RAISED = 3  # exit status of a worker that has sent what it raised
END_S = 5.0  # for closing a game, which takes well under 1


class Worker:
    """A process that does `work(*share)`."""

    def __init__(self, work: Callable[..., None], share: Sequence[Any]) -> None:
        self._errors, sender = SPAWN.Pipe(duplex=False)
        self._process = SPAWN.Process(target=_run, args=(work, share, sender))
        self._process.start()
        sender.close()

    def is_running(self) -> bool:
        """Raises the worker's exception, or UserError if it was killed."""
        status = self._process.exitcode
        if status == RAISED:
            raise self._errors.recv()
        if status:
            raise game_ended(f"its process, with status {status}")
        return status is None

    def end(self) -> None:
        """Lets it close its game; kills both after END_S."""
        group, until = self._process.ident, time.monotonic() + END_S
        assert group
        while self._process.is_alive() and time.monotonic() < until:
            self._process.terminate()  # again and again: what a signal raises in a library's callback is lost
            self._process.join(0.5)
        with suppress(ProcessLookupError):  # if it is no group yet, or no more
            os.killpg(group, signal.SIGKILL)
        self._process.kill()
        self._process.join()


@contextmanager
def spawn_workers(work: Callable[..., None], shares: Sequence[Sequence[Any]]) -> Iterator[list[Worker]]:
    """A worker per share; neither workers nor their games outlive the block."""
    workers: list[Worker] = []
    try:
        for share in shares:
            workers.append(Worker(work, share))
        yield workers
    finally:
        for worker in workers:
            worker.end()


def game_ended(how: str) -> UserError:
    return UserError(f"a game ended by itself ({how}): was it killed, or out of memory? Run the same command to go on")


def _run(work: Callable[..., None], share: Sequence[Any], errors: Connection) -> None:
    os.setpgid(0, 0)  # its game ignores SIGTERM and would outlive it: both are killed as one group
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    threading.Thread(target=_watch, daemon=True).start()
    try:
        work(*share)
    except Exception as error:  # noqa: BLE001 - the program raises it again
        error.add_note(traceback.format_exc())
        errors.send(error)
        sys.exit(RAISED)


def _watch() -> None:
    """Ends this process with its program, or END_S after its game, for which ViZDoom may wait for ever."""
    program = multiprocessing.parent_process()
    assert program is not None
    alive_s = math.inf  # when the game was last seen; it has not started yet
    while program.is_alive() and time.monotonic() < alive_s + END_S:
        program.join(1.0 if alive_s < math.inf else 0.02)  # a game may be killed soon after its start
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if any(game.status() != psutil.STATUS_ZOMBIE for game in psutil.Process().children()):
                alive_s = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os.killpg(0, signal.SIGKILL)
