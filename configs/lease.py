"""One writer at a time for a folder: a lock on this machine, and a lease in a bucket."""

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from configs import storage
from configs.errors import FileError, UserError
from configs.files import machine_id

EXPIRED_S = 30.0  # after so long without a renewal the holder of a lease is gone


@contextmanager
def sole_writer(folder: str | Path, what: str, url: str = "") -> Iterator[None]:
    """Holds `folder`, which is made, and the `url` in a bucket that it is a copy of, if any, for a `what`: another
    process that asks for them meanwhile gets a UserError."""
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"{folder} is in use by the {what} of {file.read()}; choose another out=") from error
        except OSError as error:
            fix = "mount that file system with locks, or choose another out="
            raise FileError(f"cannot lock {path}: {error.strerror}; {fix}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        with _lease(url, what, f"{machine_id()} {folder}") if storage.is_s3(url) else nullcontext():
            yield


def _no_link(path: str, flags: int) -> int:
    """Follows no link: the lock's file is emptied, and a link in somebody else's folder could lead to any file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def _lease(url: str, what: str, holder: str) -> Iterator[None]:
    """Holds the s3 `url` by a file there that is renewed. One that is no longer renewed is taken over."""
    claim, mine, ended = storage.join(url, f"{what}.claim"), os.fsencode(f"{holder}\n"), threading.Event()

    def renew() -> None:
        while not ended.wait(EXPIRED_S / 4):
            with suppress(OSError):  # the next one may succeed
                storage.write_text(claim, f"{holder}\n{time.time()}")

    in_use = UserError(f"{url} is in use by another {what} (see {what}.claim); choose another out=")
    with suppress(FileNotFoundError):  # there is no claim, or it is released meanwhile
        before, deadline = storage.read_bytes(claim), time.monotonic() + EXPIRED_S
        # A claim of the same holder is of a killed process: this one has its lock.
        while not before.startswith(mine) and time.monotonic() < deadline:
            time.sleep(EXPIRED_S / 30)
            if storage.read_bytes(claim) != before:
                raise in_use
        storage.remove(claim)
    if not storage.create(claim, mine + str(time.time()).encode()):
        raise in_use
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        storage.remove(claim)
