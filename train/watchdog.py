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
STACKS_S = 10.0  # for writing the stacks of a rank that ends, and for copying them to a server
NO_ANSWER = "rank 0's machine, which keeps the store, does not answer"

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
    """Two threads: one sends heartbeats (number and phase) through the process group's store, one ends this rank when a
    phase takes longer than `limit_s`. Stacks go into `folder`, and to the s3:// `url` if there is one.

    The store may not answer at all, if the machine that keeps it is cut off: it is asked with a time limit.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, limit_s: float, url: str = "") -> None:
        self.folder, self.rank, self.ranks, self.limit_s, self.url = folder, rank, ranks, limit_s, url
        self.store = own_store()
        self.phase, self.since = "starting", time.monotonic()
        self._done = threading.Event()

    def begins(self, step: int, phase: str) -> None:
        """This rank is now in `phase` of `step`, whose time begins."""
        self.phase, self.since = f"{phase} in step {step}", time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches during the block. If a collective in it fails because a peer is lost, this rank ends with one line
        that names the peer."""
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
        take `limit_s`. The others wait at its end as long as rank 0 sends heartbeats."""
        self.begins(step, phase)
        yield lambda: self.begins(step, phase)
        if self.store is None:
            return
        key, newest = f"worldloom/{phase}/{step}", None
        if self.rank == 0:
            self.store.set(key, "done")
        while not self._ask(self.store.check, [key]):
            heartbeat = self._ask(self.store.get, "worldloom/0")
            if heartbeat not in (None, newest):
                newest = heartbeat
                self.begins(step, f"waiting for rank 0, which is {phase},")
            time.sleep(HEARTBEAT_S)

    def _ask(self, question: Callable[..., T], *args: Any) -> T | None:
        """The answer of the store, or None if there is none."""
        with suppress(ConnectionError):
            return call("asking the store", MISSED_S, question, *args)
        return None

    def _heartbeats(self, store: dist.Store) -> dict[int, str]:
        """The newest of every other rank."""
        keys = {rank: f"worldloom/{rank}" for rank in range(self.ranks) if rank != self.rank}
        return {rank: store.get(key).decode() if store.check([key]) else "0 starting" for rank, key in keys.items()}

    def _find_missing(self) -> tuple[list[str], list[str]]:
        """Ranks that send no heartbeat, and those in another phase than this rank, which waits for them."""
        before = self._ask(self._heartbeats, self.store)
        time.sleep(MISSED_S + HEARTBEAT_S)
        after = self._ask(self._heartbeats, self.store)
        if before is None or after is None:
            return [NO_ANSWER], []
        phases = {rank: heartbeat.partition(" ")[2] for rank, heartbeat in after.items()}
        lost = [rank for rank in phases if after[rank] == before[rank]]
        others = [f"rank {rank} ({phase})" for rank, phase in phases.items() if phase != self.phase]
        return [f"rank {rank} (silent for {MISSED_S:.0f} s; it was {phases[rank]})" for rank in lost], others

    def _send_heartbeats(self) -> None:
        for number in count(1):
            with suppress(RuntimeError):  # the store is gone: the next collective, or the clock, will tell
                assert self.store is not None
                self.store.set(f"worldloom/{self.rank}", f"{number} {self.phase}")
            if self._done.wait(HEARTBEAT_S):
                return

    def _watch(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            late = time.monotonic() - self.since
            if late > self.limit_s:
                lost, others = self._find_missing()
                self._end(lost or others or ["nobody: all ranks do the same"], f"it has taken {late:.0f} s")

    def _end(self, missing: list[str], why: str, error: str = "") -> None:
        """Ends this process, whether or not its message and stacks can be written."""
        path = self.folder / f"stacks_rank_{self.rank:05d}.txt"
        try:
            print(
                f"train run: rank {self.rank} stops while {self.phase}: {why}; missing: {', '.join(missing)}; stacks "
                f"in {path}; the same command goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            # In a thread that is not waited for: what hangs may be the very disk of the run folder.
            with suppress(ConnectionError):
                call("writing stacks", STACKS_S, self._write_stacks, path, error)
        finally:
            os._exit(1)

    def _write_stacks(self, path: Path, error: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(error)
            file.flush()  # what follows goes past Python's buffer
            faulthandler.dump_traceback(file, all_threads=True)
        if self.url:
            s3.upload(path, storage.join(self.url, path.name))
