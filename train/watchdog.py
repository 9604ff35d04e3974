"""A rank that dies or hangs must not keep the others waiting: who is missing is said, stacks are written, all stop."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs import storage

BEAT_S = 0.5  # between two signs of life of a rank
SILENT_S = 6 * BEAT_S  # after which a rank counts as gone
WAITING_S = 30.0  # the same while rank 0 works alone, which may take it hours, or engine.timeout_s if that is less
COPYING_S = 10.0  # that a rank which ends gives the copy of its stacks to a server
NO_ANSWER = "rank 0's machine, which keeps the store, does not answer"
STACKS = "stacks_rank_{rank:05d}.txt"  # in the run folder


T = TypeVar("T")


def own_store() -> dist.Store | None:
    """The store of the process group, over a connection of its own; None where there is one process."""
    if not dist.is_initialized():
        return None
    return distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs


class Watchdog:
    """A thread that tells the other ranks that this one lives, and one that ends it when something takes longer than
    `limit_s`.

    Signs of life go through the store of the process group: (how many so far, step, what the rank is doing). Whether a
    rank still gives them is seen by this one's own clock. The store may answer nothing at all, if the machine that
    keeps it is cut off: only threads that nobody waits for ask it. It is asked over a connection of its own: torch
    waits for peers on the other one, and what waits there lets nobody else ask.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, limit_s: float, url: str = "") -> None:
        """`url`: an s3:// place to which stacks are copied, since `folder` may go with its machine."""
        self.folder, self.rank, self.ranks, self.limit_s, self.url = folder, rank, ranks, limit_s, url
        self.store = own_store()
        self.doing, self.step, self.since = "starting", -1, time.monotonic()
        self._seen: dict[int, tuple[str, float]] = {}  # of each rank, its newest sign, and since when it is the newest
        self._done = threading.Event()

    def begins(self, step: int, doing: str) -> None:
        """This rank now does `doing` for `step`; the clock starts anew."""
        self.step, self.doing, self.since = step, doing, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches within the block. An error of a collective in it, which a lost peer causes, ends this rank with one
        line that names the peer; other errors pass."""
        if self.store is None:
            yield
            return
        for work in (self._live, self._watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            gone = self._find_silent()
            if not gone:
                raise
            self._end(gone, f"a collective failed ({str(error).splitlines()[0][:120]})", traceback.format_exc())
        finally:
            self._done.set()

    @contextmanager
    def main_alone(self, step: int, doing: str) -> Iterator[Callable[[], None]]:
        """Within the block rank 0 may work by itself for longer than a step may take, and the others wait at its end.
        It gives what rank 0 is to call after every piece of the work, since each of these has the limit to itself."""
        self.begins(step, doing)
        yield lambda: self.begins(step, doing)
        if self.store is None:
            return
        key = f"worldloom/{doing}/{step}"
        if self.rank == 0:
            self.store.set(key, "done")
        patience, heard = min(WAITING_S, self.limit_s), time.monotonic()
        while not (done := self._ask(lambda: self.store is None or self.store.check([key]))):
            self.begins(step, f"waiting for rank 0, which is {doing},")
            if done is not None:
                heard = time.monotonic()
            gone = self._ask(lambda: self.silent(patience))
            if time.monotonic() - heard >= patience:
                gone = [NO_ANSWER]
            if gone:
                self._end(gone, f"waited for rank 0, which was {doing}")
            time.sleep(BEAT_S)

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer, or None if the store gives none: a machine that is cut off answers nothing, and refuses
        nothing."""
        answer: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answer.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(SILENT_S)
        return answer[0] if answer else None

    def _find_silent(self) -> list[str]:
        """Ranks that give no sign of life now; looks for as long as it takes to tell."""
        found = self._ask(self.silent)
        if found is not None:
            time.sleep(SILENT_S + BEAT_S)
            found = self._ask(self.silent)
        return [NO_ANSWER] if found is None else found

    def silent(self, for_s: float = SILENT_S) -> list[str]:
        """Ranks that have given no new sign of life for `for_s`, in which this was asked again and again, with what
        they did last."""
        now, found = time.monotonic(), []
        for rank in range(self.ranks):
            if rank == self.rank:
                continue
            if not (self.store and self.store.check([f"worldloom/{rank}"])):
                sign = "0 -1 never heard of"
            else:
                sign = self.store.get(f"worldloom/{rank}").decode()
            newest, since = self._seen.get(rank, ("", now))
            if sign != newest:
                self._seen[rank], since = (sign, now), now
            if now - since >= for_s:
                _, step, doing = sign.split(" ", 2)
                found.append(f"rank {rank} (silent for {now - since:.0f} s; it was {doing} in step {step})")
        return found

    def _live(self) -> None:
        for beat in count(1):
            if self._done.is_set():
                return
            with suppress(RuntimeError):  # the store is gone: the next collective, or the clock, will tell
                assert self.store is not None
                self.store.set(f"worldloom/{self.rank}", f"{beat} {self.step} {self.doing}")
            self._done.wait(BEAT_S)

    def _watch(self) -> None:
        while not self._done.wait(BEAT_S):
            late = time.monotonic() - self.since
            if late > self.limit_s:
                missing = self._find_silent() or self._ask(self._others) or [NO_ANSWER]
                self._end(missing, f"{self.doing} has taken {late:.0f} s")

    def _others(self) -> list[str]:
        """Ranks that are alive and do something else than this one, which waits for them."""
        assert self.store is not None
        found = []
        for rank in range(self.ranks):
            _, step, doing = self.store.get(f"worldloom/{rank}").decode().split(" ", 2)
            if (int(step), doing) != (self.step, self.doing):
                found.append(f"rank {rank} ({doing} in step {step})")
        return found or ["nobody: all ranks do the same"]

    def _end(self, missing: list[str], why: str, error: str = "") -> None:
        """Ends this process, whether or not its words and stacks can be written."""
        path = self.folder / STACKS.format(rank=self.rank)
        try:
            print(
                f"train run: rank {self.rank} stops in step {self.step}: {why}; missing: {', '.join(missing)}; stacks "
                f"in {path}; the same command goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            # In a thread that is not waited for: what hangs may be the very disk of the run folder.
            writing = threading.Thread(target=_write_stacks, args=(path, error, self.url), daemon=True)
            writing.start()
            writing.join(COPYING_S if self.url else SILENT_S)
        finally:
            os._exit(1)


def _write_stacks(path: Path, error: str, url: str) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(error)
            file.flush()  # what follows goes past Python's buffer
            faulthandler.dump_traceback(file, all_threads=True)
        if url:
            storage.write_file(path, storage.join(url, path.name))
