"""Threads that work ahead: one prepares the next items of an iterator, one copies the shards of the next group."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class PrefetchThread(Generic[T]):
    """An iterator over `items`; a thread has up to `ahead` of them ready. What they raise comes in their place.

    Two queues, one of free places, cost less per item than a pool of threads and its futures.
    """

    def __init__(self, items: Iterator[T], ahead: int, name: str = "prefetch") -> None:
        self.waited_s = 0.0  # by the consumer
        self._room, self._ready = SimpleQueue[None](), SimpleQueue[tuple[T, None] | tuple[None, BaseException]]()
        for _ in range(ahead):
            self._room.put(None)
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[T]) -> None:
        while True:
            self._room.get()
            if self._closed:
                return
            try:
                self._ready.put((next(items), None))  # not kept here: its memory is free when the consumer is done
            except BaseException as error:  # noqa: BLE001 - raised in the consumer; StopIteration is the end
                self._ready.put((None, error))
                return

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        item, error = self._ready.get()
        self.waited_s += time.perf_counter() - began
        if error is not None:
            self._ready.put((None, error))
            raise error
        self._room.put(None)
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Begins no further item, and waits for the one at hand."""
        self._closed = True
        self._room.put(None)
        self._thread.join()


class ShardPrefetcher:
    """Copies shards to this machine one after the other, those that follow the group of shards in use."""

    def __init__(self, fetch: Callable[[int], None], shards_after: Callable[[int, int], Sequence[int]]) -> None:
        self._fetch, self._shards_after = fetch, shards_after
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-prefetch")
        self._group: tuple[int, int] | None = None
        self._copies: list[Future[None]] = []

    def reach(self, group: tuple[int, int]) -> None:
        """To be called with the epoch and the group of shards that are in use now."""
        if group == self._group:
            return
        for copy in self._copies:  # of the group that is read now
            copy.cancel()
        self._group = group
        # An error stays in its future: it comes again when a clip of that shard is read.
        self._copies = [self._pool.submit(self._fetch, shard) for shard in self._shards_after(*group)]

    def close(self) -> None:
        """Begins no further copy, and waits for the one at hand."""
        self._pool.shutdown(cancel_futures=True)
