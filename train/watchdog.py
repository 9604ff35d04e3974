"""A rank that dies or hangs must not keep the others waiting: who is missing is said, stacks are written, all stop."""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

BEAT_S = 0.5  # between two signs of life of a rank
SILENT_S = 6 * BEAT_S  # after which a rank counts as gone
STACKS = "stacks_rank_{rank:05d}.txt"  # in the run folder


class Watchdog:
    """A thread that tells the other ranks that this one lives, and ends it when a step takes longer than `limit_s`.

    Signs of life go through the store of the process group: (time, step, what the rank is doing).
    """

    def __init__(self, folder: Path, rank: int, ranks: int, limit_s: float) -> None:
        self.folder, self.rank, self.ranks, self.limit_s = folder, rank, ranks, limit_s
        self.store = distributed_c10d._get_default_store() if dist.is_initialized() else None
        self.doing, self.step, self.since = "starting", -1, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

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
        self._live()
        self._thread.start()
        try:
            yield
        except RuntimeError as error:
            time.sleep(SILENT_S)  # until a peer that is gone has been silent for long enough
            gone = self._ask(self.silent)
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
        while not self.store.check([key]):
            self.begins(step, f"waiting for rank 0, which is {doing},")
            if gone := self.silent():
                self._end(gone, f"waited for rank 0, which was {doing}")
            time.sleep(BEAT_S)

    def _ask(self, question: Callable[[], list[str]]) -> list[str]:
        """The answer, or that the store gives none: a machine that is cut off answers nothing, and refuses nothing."""
        answer: list[list[str]] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answer.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(SILENT_S)
        return answer[0] if answer else ["rank 0's machine, which keeps the store, does not answer"]

    def silent(self) -> list[str]:
        """Ranks without a sign of life, with what they did last; the clocks of all machines must agree to seconds."""
        now, found = time.time(), []
        for rank in range(self.ranks):
            if rank == self.rank:
                continue
            key = f"worldloom/{rank}"
            if not (self.store and self.store.check([key])):
                found.append(f"rank {rank} (never heard of)")
                continue
            at, step, doing = self.store.get(key).decode().split(" ", 2)
            if now - float(at) > SILENT_S:
                found.append(f"rank {rank} (silent for {now - float(at):.0f} s; it was {doing} in step {step})")
        return found

    def _live(self) -> None:
        assert self.store is not None
        self.store.set(f"worldloom/{self.rank}", f"{time.time()} {self.step} {self.doing}")

    def _watch(self) -> None:
        while not self._done.wait(BEAT_S):
            late = time.monotonic() - self.since
            if late > self.limit_s:
                self._end(self._ask(self.silent) or self._ask(self._others), f"{self.doing} has taken {late:.0f} s")
            try:
                self._live()
            except RuntimeError:  # the store is gone: the next collective, or the clock, will tell
                self._done.wait(self.limit_s / 10)

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
        path = self.folder / STACKS.format(rank=self.rank)
        with open(path, "w", encoding="utf-8") as file:
            file.write(error)
            file.flush()  # what follows goes past Python's buffer
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"train run: rank {self.rank} stops in step {self.step}: {why}; missing: {', '.join(missing)}; stacks in "
            f"{path}; the same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
