"""Threads that make batches, and copies of shards, before they are asked for."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from data_pipeline.order import Order
from data_pipeline.shard_set import Shards
from data_pipeline.types import Batch


class Reader:
    """A thread that makes every so many a batch, up to `ahead` of them before they are asked for.

    Two queues, one of free places, cost less per batch than a pool of threads and its futures do.
    """

    def __init__(self, make: Callable[[int], Batch], steps: Iterator[int], ahead: int) -> None:
        self._room, self._made = SimpleQueue[None](), SimpleQueue[Batch | BaseException]()
        for _ in range(ahead):
            self._room.put(None)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(make, steps), name="stream", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Batch], steps: Iterator[int]) -> None:
        for step in steps:
            self._room.get()
            if self._stopped:
                return
            try:
                self._made.put(make(step))  # held by nobody else: its memory is free when the reader of it is done
            except BaseException as error:  # noqa: BLE001 - whoever asks for the batch gets it
                self._made.put(error)
                return

    def next(self) -> Batch:
        """The next one; raises what went wrong in making it."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        self._room.put(None)
        return made

    def stop(self) -> None:
        """No further batch is begun."""
        self._stopped = True
        self._room.put(None)

    def join(self) -> None:
        """Waits for what the thread is at."""
        self._thread.join()


class Fetching:
    """Copies the shards that a rank needs of the group after the one in use to this machine, one after the other."""

    def __init__(self, order: Order, shards: Shards, batch: int, rank: int, world: int) -> None:
        self.order, self.shards, self._dealt = order, shards, (batch, rank, world)
        self._pool, self._stopped = ThreadPoolExecutor(1, thread_name_prefix="fetching"), False
        self._group: tuple[int, int] | None = None
        self._done: Future[None] | None = None

    def at(self, sample: int) -> None:
        """Says that reading has come to `sample`."""
        if not self.order.shuffle_shards or (self._done and not self._done.done()):
            return
        group = self.order.group(sample)
        if group != self._group:
            self._group = group
            self._done = self._pool.submit(self._fetch_after, *group)

    def _fetch_after(self, epoch: int, group: int) -> None:
        for shard in self.order.shards_after(epoch, group, *self._dealt):
            if self._stopped:
                return
            try:
                self.shards.fetch(shard)
            except (ValueError, OSError):
                continue  # whoever needs a clip of it will say so

    def stop(self) -> None:
        """No further copy is begun."""
        self._stopped = True

    def join(self) -> None:
        """Waits for what the thread is at."""
        self._pool.shutdown()
