"""One writer at a time for a folder on a server."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs import storage
from configs.errors import UserError
from configs.files import this_machine
from configs.s3_errors import NotOffered

EXPIRED_S = 30.0  # after so long without a renewal the holder of a lease is gone


@contextmanager
def lease(url: str, what: str, folder: Path) -> Iterator[None]:
    """Holds the s3 `url` for the `what` that has locked its `folder` on this machine, by a renewed file there; nothing
    on a server that cannot create a file only once. One that is no longer renewed is taken over. Raises UserError if
    another process holds it."""
    place, holder, ended = storage.join(url, f"{what}.claim"), f"{this_machine()} {folder}", threading.Event()

    def renew() -> None:
        for number in range(1, 1 << 62):
            if ended.wait(EXPIRED_S / 4):
                return
            with suppress(OSError):  # the next one may succeed
                storage.write_text(place, json.dumps({"holder": holder, "renewed": number}))

    try:
        _acquire(place, holder, what)
    except NotOffered:
        yield
        return
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        storage.remove(place)


def _acquire(place: str, holder: str, what: str) -> None:
    text = json.dumps({"holder": holder, "renewed": 0})
    if storage.create(place, text.encode()):
        return
    in_use = UserError(f"{storage.parent(place)} is in use by another {what} (see {what}.claim); choose another out=")
    with suppress(FileNotFoundError):  # released meanwhile
        before, deadline = storage.read_bytes(place), time.monotonic() + EXPIRED_S
        # A lease of the same holder is of a killed process: this one has its lock.
        while json.dumps(holder).encode() not in before and time.monotonic() < deadline:
            time.sleep(EXPIRED_S / 30)
            if storage.read_bytes(place) != before:
                raise in_use
        storage.remove(place)
    if not storage.create(place, text.encode()):
        raise in_use
