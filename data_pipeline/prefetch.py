"""Calls made in threads before their results are asked for."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def run_ahead(calls: Iterator[Callable[[], T]], threads: int, ahead: int, name: str) -> Generator[T, None, None]:
    """The results of `calls`, which has no end, in order; `threads` make up to `ahead` of them before they are asked
    for. What a call raises is raised in its place. Closing begins no further call, and waits for those at hand."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        ready = deque(pool.submit(call) for call in islice(calls, ahead))
        for call in calls:
            result = ready.popleft().result()
            ready.append(pool.submit(call))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
