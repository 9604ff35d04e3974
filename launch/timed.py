"""Work that may hang, given a limit: whoever waits for it is told what it was doing."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
SOURCE = re.compile(r"^\[[^]]+:\d+\] ")  # the line of C++ that gloo begins its errors with


@dataclass
class Doing:
    """What the work is at; it says so itself."""

    name: str = "starting"


def within(limit_s: float, work: Callable[[Doing], T]) -> tuple[T | None, str]:
    """What `work` gives and "", or None and one line: what it was doing when it failed or when the time was over.

    It runs in a thread that cannot be ended: after the limit, leave by `os._exit`.
    """
    doing, results, errors = Doing(), list[T](), list[str]()

    def run() -> None:
        try:
            results.append(work(doing))
        except (RuntimeError, OSError, ValueError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            errors.append(f"{doing.name} failed: {SOURCE.sub('', first)[:300]}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0], ""
    if errors:
        return None, errors[0]
    if thread.is_alive():
        return None, f"{doing.name} did not end within {limit_s:g} s"
    return None, f"{doing.name} broke off, see the traceback"
