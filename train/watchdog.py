"""A rank that dies or hangs must not keep the others waiting: it is named, stacks are written, and all ranks stop."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs import s3, storage
from configs.errors import one_line

HEARTBEAT_S = 0.5  # between two heartbeats of a rank
MISSED_S = 6 * HEARTBEAT_S  # after which a rank counts as gone
WAITING_S = 30.0  # the same while rank 0 works alone, which may take it hours, or engine.timeout_s if that is less
COPYING_S = 10.0  # for copying the stacks of a rank that ends to a server
NO_ANSWER = "rank 0's machine, which keeps the store, does not answer"
STACKS = "stacks_rank_{rank:05d}.txt"  # in the run folder

T = TypeVar("T")


def own_store() -> dist.Store | None:
    """The store of the process group, over a connection of its own: torch waits for peers on the other one, and blocks
    it. None where there is one process."""
    if not dist.is_initialized():
        return None
    return distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs


def call(what: str, limit_s: float, function: Callable[..., T], *args: Any) -> T:
    """What `function` gives. ConnectionError with one line if it fails or does not end within `limit_s`: then it goes
    on in its thread, which cannot be ended and does not keep the process from ending."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except (RuntimeError, OSError, ValueError) as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(limit_s)
    except (RuntimeError, OSError, ValueError) as error:
        why = f"failed: {one_line(error)[:300]}" if future.done() else f"did not end within {limit_s:g} s"
        raise ConnectionError(f"{what} {why}") from error


class Watchdog:
    """Two threads: one sends heartbeats (number, step, phase) through the process group's store, one ends this rank
    when a phase takes longer than `limit_s`. Stacks go into `folder`, and to the s3:// `url` if there is one.

    The store may not answer at all, if the machine that keeps it is cut off: it is asked with a time limit.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, limit_s: float, url: str = "") -> None:
        self.folder, self.rank, self.ranks, self.limit_s, self.url = folder, rank, ranks, limit_s, url
        self.store = own_store()
        self.phase, self.step, self.since = "starting", -1, time.monotonic()
        self._done = threading.Event()

    def begins(self, step: int, phase: str) -> None:
        """This rank is now in `phase` of `step`, whose time begins."""
        self.step, self.phase, self.since = step, phase, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches within the block, in which a collective that fails because a peer is lost ends this rank with one
        line that names the peer."""
        if self.store is None:
            yield
            return
        for work in (self._send_heartbeats, self._watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            lost, _ = self._find_missing()
            if not lost:
                raise
            self._end(lost, f"a collective failed ({str(error).splitlines()[0][:120]})", traceback.format_exc())
        finally:
            self._done.set()

    @contextmanager
    def rank0_section(self, step: int, phase: str) -> Iterator[Callable[[], None]]:
        """A block in which rank 0 works alone, calling the function given after every piece of work, each of which may
        take `limit_s`. The others wait at its end as long as rank 0 lives."""
        self.begins(step, phase)
        yield lambda: self.begins(step, phase)
        if (store := self.store) is None:
            return
        key = f"worldloom/{phase}/{step}"
        if self.rank == 0:
            store.set(key, "done")
        patience, newest, heard = min(WAITING_S, self.limit_s), "", time.monotonic()
        while not self._ask(lambda: store.check([key])):
            self.begins(step, f"waiting for rank 0, which is {phase},")
            heartbeat, now = self._ask(lambda: store.get("worldloom/0").decode()), time.monotonic()
            if heartbeat not in (None, newest):
                newest, heard = heartbeat, now
            if now - heard >= patience:
                lost = NO_ANSWER if heartbeat is None else _silent(0, newest, now - heard)
                self._end([lost], f"waited for rank 0, which was {phase}")
            time.sleep(HEARTBEAT_S)

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer of the store, or None if there is none."""
        with suppress(ConnectionError):
            return call("asking the store", MISSED_S, question)
        return None

    def _heartbeats(self) -> dict[int, str]:
        """The newest of every other rank."""
        store, newest = self.store, {}
        assert store is not None
        for rank in set(range(self.ranks)) - {self.rank}:
            key = f"worldloom/{rank}"
            newest[rank] = store.get(key).decode() if store.check([key]) else "0 -1 never heard of"
        return newest

    def _find_missing(self) -> tuple[list[str], list[str]]:
        """Ranks that send no heartbeat, and those in another phase than this rank, which waits for them."""
        before = self._ask(self._heartbeats)
        time.sleep(MISSED_S + HEARTBEAT_S)
        after = self._ask(self._heartbeats)
        if before is None or after is None:
            return [NO_ANSWER], []
        lost = [_silent(rank, beat, MISSED_S) for rank, beat in after.items() if beat == before[rank]]
        phases = {rank: tuple(beat.split(" ", 2)[1:]) for rank, beat in after.items()}
        others = [f"rank {r} ({p[1]} in step {p[0]})" for r, p in phases.items() if p != (str(self.step), self.phase)]
        return lost, others

    def _send_heartbeats(self) -> None:
        for number in count(1):
            if self._done.is_set():
                return
            with suppress(RuntimeError):  # the store is gone: the next collective, or the clock, will tell
                assert self.store is not None
                self.store.set(f"worldloom/{self.rank}", f"{number} {self.step} {self.phase}")
            self._done.wait(HEARTBEAT_S)

    def _watch(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            late = time.monotonic() - self.since
            if late > self.limit_s:
                lost, others = self._find_missing()
                missing = lost or others or ["nobody: all ranks do the same"]
                self._end(missing, f"{self.phase} has taken {late:.0f} s")

    def _end(self, missing: list[str], why: str, error: str = "") -> None:
        """Ends this process, whether or not its message and stacks can be written."""
        path = self.folder / STACKS.format(rank=self.rank)
        try:
            print(
                f"train run: rank {self.rank} stops in step {self.step}: {why}; missing: {', '.join(missing)}; stacks "
                f"in {path}; the same command goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            # In a thread that is not waited for: what hangs may be the very disk of the run folder.
            with suppress(ConnectionError):
                call("writing stacks", COPYING_S if self.url else MISSED_S, _write_stacks, path, error, self.url)
        finally:
            os._exit(1)


def _silent(rank: int, heartbeat: str, for_s: float) -> str:
    _, step, phase = heartbeat.split(" ", 2)
    return f"rank {rank} (silent for {for_s:.0f} s; it was {phase} in step {step})"


def _write_stacks(path: Path, error: str, url: str) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(error)
            file.flush()  # what follows goes past Python's buffer
            faulthandler.dump_traceback(file, all_threads=True)
        if url:
            s3.upload(path, storage.join(url, path.name))
