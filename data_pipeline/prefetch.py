"""A thread that prepares the next items of an iterator."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class PrefetchThread(Generic[T]):
    """An iterator over `items`; a thread has up to `ahead` of them ready. What they raise comes in their place."""

    def __init__(self, items: Iterator[T], ahead: int, name: str = "prefetch") -> None:
        self._items = items
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._ready = deque(self._pool.submit(next, items) for _ in range(ahead))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._ready[0].result()  # an error stays the first, and is raised by every call
        self._ready.popleft()
        self._ready.append(self._pool.submit(next, self._items))
        return item

    def close(self) -> None:
        """Begins no further item, and waits for the one at hand."""
        self._pool.shutdown(cancel_futures=True)
