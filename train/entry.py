"""`python -m train`: runs, and tells whoever started the run how it ended."""

import errno
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from configs import load_config
from configs.errors import is_users
from configs.files import NO_ROOM
from train.config import ASKED, ENDED, FAULT, TrainConfig
from train.engines import engine_of
from train.loop import train


def run(args: list[str]) -> None:
    """Train a world model on latent shards (the default: an argument that is no verb begins its settings)."""
    try:
        if train(load_config(TrainConfig, args)):
            _say_how_it_ended(ASKED)
    except (ValueError, OSError) as error:
        if is_users(error):
            if needs_a_person(error):
                _say_how_it_ended(FAULT)
            # Every rank meets the same fault: rank 0 says it, and the launcher ends the others while they wait here.
            if os.environ.get("RANK", "0") != "0":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(5)
        raise


def needs_a_person(error: BaseException) -> bool:
    """Whether the same command would only meet the same fault again: a server or a disk may be back a little later."""
    if not isinstance(error, OSError):
        return True
    told = isinstance(error, FileNotFoundError | PermissionError | FileExistsError | NotADirectoryError)
    cause = error.__cause__  # of those that say more
    return told or error.errno in (*NO_ROOM, errno.EROFS) or (isinstance(cause, OSError) and needs_a_person(cause))


def _say_how_it_ended(how: str) -> None:
    """To whoever started the run: `accelerate launch` ends with 1 or 0 whatever its processes end with."""
    with suppress(OSError):  # a container may not have the place
        if place := os.environ.get(ENDED):
            Path(place).write_text(how)


def print_engine(config: TrainConfig) -> None:
    """Print the settings of a run's engine without starting it: the same arguments as for training"""
    print(json.dumps({config.engine.name: engine_of(config).settings(config)}, indent=2))
