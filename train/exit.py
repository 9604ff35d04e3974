"""How a run ends early, on a signal or with an error, and what the program that launched it learns of that."""

import errno
import os
import signal
from contextlib import suppress
from pathlib import Path

from configs.files import NO_ROOM

# `accelerate launch` exits with 1 or 0 whatever its processes exit with, so they write one of these into a file.
ENDED = "WORLDLOOM_ENDED"  # environment variable: the file
FAULT, ASKED = "fault", "asked to stop"  # a person has to fix something; the run is to be started again
STOPPED = "STOPPED"  # file in the run folder, while a run that was asked to stop has not gone on


def report_exit(how: str) -> None:
    if path := os.environ.get(ENDED):
        with suppress(OSError):  # a container may not have the folder
            Path(path).write_text(how)


def needs_a_person(error: BaseException) -> bool:
    """Whether the same command would meet the same error again: a server or a disk may be back a little later."""
    if not isinstance(error, OSError):
        return True
    lasting = FileNotFoundError | PermissionError | FileExistsError | NotADirectoryError
    if isinstance(error, lasting) or error.errno in (*NO_ROOM, errno.EROFS):
        return True
    return isinstance(error.__cause__, OSError) and needs_a_person(error.__cause__)


class StopRequest:
    """Set by SIGUSR1 (Slurm's warning), Ctrl-C or SIGTERM; the loop finishes its step, saves and returns."""

    def __init__(self) -> None:
        self.asked = False
        self.listen(signal.SIGUSR1, signal.SIGINT)

    def listen(self, *signals: signal.Signals) -> None:
        for number in signals:
            signal.signal(number, lambda *_: setattr(self, "asked", True))
