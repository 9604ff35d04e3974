"""Processes that play games. Each is watched; it ends together with its game, and with the program that began it."""

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

SPAWN = multiprocessing.get_context("spawn")
RAISED = 3  # exit status of a player that has sent what it raised
END_S = 5.0  # for closing a game, which takes well under 1


class Player:
    """A process of its own that does `work(*given)`."""

    def __init__(self, work: Callable[..., None], given: Sequence[Any]) -> None:
        self._heard, said = SPAWN.Pipe(duplex=False)
        self._process = SPAWN.Process(target=_work, args=(work, given, said))
        self._process.start()
        said.close()

    def plays(self) -> bool:
        """Whether it still works. Raises what it raised, or ChildProcessError if it ended by itself."""
        status = None if self._process.is_alive() else self._process.exitcode
        if status == RAISED:
            raise self._heard.recv()
        if status:
            raise ChildProcessError(ended_by_itself(f"the process of a game ended with status {status}"))
        return status is None

    def end(self) -> None:
        """Has it close its game; kills both if that takes more than some seconds."""
        group, until = self._process.ident, time.monotonic() + END_S
        assert group
        while self._process.is_alive() and time.monotonic() < until:
            self._process.terminate()  # again, as what a signal raises is lost within a callback of a library
            self._process.join(0.5)
        with suppress(ProcessLookupError):  # if it is no group yet, or no more
            os.killpg(group, signal.SIGKILL)
        self._process.kill()
        self._process.join()


@contextmanager
def playing(work: Callable[..., None], given: Sequence[Sequence[Any]]) -> Iterator[list[Player]]:
    """A player for each of `given`; none of them, nor a game of theirs, outlives the block."""
    players: list[Player] = []
    try:
        for one in given:
            players.append(Player(work, one))
        yield players
    finally:
        for player in players:
            player.end()


def ended_by_itself(what: str) -> str:
    """What a person is told about a process that nobody asked to end."""
    return f"{what}: was it killed, or is memory short? Run the same command to go on"


def _work(work: Callable[..., None], given: Sequence[Any], said: Connection) -> None:
    os.setpgid(0, 0)  # its game ignores SIGTERM and sleeps on without it: both are killed as one group
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    threading.Thread(target=_watch, args=(said,), daemon=True).start()
    try:
        work(*given)
    except Exception as error:  # noqa: BLE001 - the program raises it again
        error.add_note(traceback.format_exc())
        said.send(error)
        sys.exit(RAISED)


def _watch(said: Connection) -> None:
    """Ends this process with its program, and some seconds after its game, if ViZDoom still waits for that then."""
    program = multiprocessing.parent_process()
    assert program is not None
    alive_s = math.inf  # when the game was last seen; it has not started yet
    while program.is_alive() and time.monotonic() < alive_s + END_S:
        program.join(1.0)
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if any(game.status() != psutil.STATUS_ZOMBIE for game in psutil.Process().children()):
                alive_s = time.monotonic()
    if program.is_alive():
        said.send(ChildProcessError(ended_by_itself("a game ended by itself")))
        os._exit(RAISED)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os.killpg(0, signal.SIGKILL)
