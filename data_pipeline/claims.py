"""Who makes which unit of work at the moment: one small file per unit, renewed while its maker lives.

Claims save double work, and nothing else hangs on them: two workers that make the same unit write the same bytes. So
a claim may be lost, or taken over from a worker that was merely slow.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs import storage
from configs.errors import UserError
from configs.files import process_start, this_machine
from configs.foreign import parse_object
from configs.s3_errors import NotOffered

CLAIM = ".claim"
STALE_S = 30.0  # after so long without a renewal, the machine that holds a url is gone


class Claims:
    """This worker's claims in one folder. A claim of a worker that ended without releasing it is taken over: at once
    if it ran on this machine, else when it has not been renewed for `stale_s`, on this worker's own clock."""

    def __init__(self, folder: str | Path, stale_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.stale_s, self._clock = str(folder), stale_s, clock
        self._token, self._beats = secrets.token_hex(8), 0
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}  # others' claims: what they said, and since when
        self._lock, self._ended = threading.Lock(), threading.Event()

    def take(self, unit: str) -> bool:
        """Whether `unit` is this worker's now; if not, somebody else makes it."""
        url = self._url(unit)
        with self._lock:
            if not storage.create(url, self._words()):
                try:
                    said = storage.read_bytes(url)
                except FileNotFoundError:  # just released: it is done, or will be found free the next time
                    return False
                if not self._left_behind(unit, said):
                    return False
                storage.remove(url)
                if not storage.create(url, self._words()):
                    return False
            self._held.add(unit)
            return True

    def release(self, unit: str) -> None:
        """Gives `unit` back, done or not."""
        with self._lock:
            if unit in self._held:
                self._held.discard(unit)
                storage.remove(self._url(unit))

    def clear(self) -> None:
        """Deletes every claim, whoever made it: when all is done, those of killed workers are left."""
        for url in storage.list_files(self.folder):
            if url.endswith(CLAIM):  # whatever else is in a folder of this name is not ours
                storage.remove(url)

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Within the block, a thread renews what is held; at its end everything is given back."""
        thread = threading.Thread(target=self._renew, name="claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            for unit in list(self._held):
                self.release(unit)

    def renew(self) -> None:
        """Says of every unit held that its maker lives."""
        with self._lock:
            self._beats += 1
            for unit in self._held:
                storage.write_text(self._url(unit), self._words().decode())

    def _renew(self) -> None:
        while not self._ended.wait(self.stale_s / 4):
            try:
                self.renew()
            except OSError:
                continue  # the next one may succeed; if none does, somebody else makes the unit too

    def _url(self, unit: str) -> str:
        return storage.join(self.folder, f"{unit}{CLAIM}")

    def _words(self) -> bytes:
        pid = os.getpid()
        told = {"host": this_machine(), "pid": pid, "started": process_start(pid), "token": self._token}
        return json.dumps({**told, "beats": self._beats}).encode()

    def _left_behind(self, unit: str, said: bytes) -> bool:
        now = self._clock()
        before, since = self._seen.get(unit, (b"", now))
        if before != said:
            self._seen[unit], since = (said, now), now
        try:
            told = parse_object(said, unit)
        except ValueError:
            told = {}
        host, pid, started = (told.get(name) for name in ("host", "pid", "started"))
        if host == this_machine() and started is not None and isinstance(pid, int):
            return process_start(pid) != started
        return now - since >= self.stale_s


@contextmanager
def claimed(url: str, what: str) -> Iterator[None]:
    """Holds the folder at the s3 `url` for a `what` within the block: other machines are told by a file that this one
    renews, where the server can create one. One that was killed on another machine is waited for until its file is
    stale. Raises ValueError in one line if another one holds it."""
    claims, deadline = Claims(url, STALE_S), time.monotonic() + 1.5 * STALE_S
    try:
        while not claims.take(what):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{url} is in use by another {what}, which says so in {what}.claim; choose another out="
                )
            time.sleep(1)
    except NotOffered:
        yield
        return
    with claims.renewed():
        yield
