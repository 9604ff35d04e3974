"""`python -m train file.yaml ... key=value ...` trains; `engine`, `codec` and `consolidate` are verbs of their own."""

import errno
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from configs.cli import PERSONS_FAULTS, first_is, run
from configs.files import NO_ROOM


def _train(words: list[str]) -> None:
    """Train a world model on latent shards (the default: a word that is no verb begins its settings)."""
    from train.config import ASKED, FAULT
    from train.loop import train

    try:
        if train(words):
            _say_how_it_ended(ASKED)
    except PERSONS_FAULTS as error:
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
    from train.config import ENDED

    with suppress(OSError):  # a container may not have the place
        if place := os.environ.get(ENDED):
            Path(place).write_text(how)


def _codec(words: list[str]) -> None:
    """Fit the demo's codec to recordings: PCA encoder, learned decoder; prints PSNR on held-out episodes."""
    from train.codec import train_codec

    train_codec(words)


def _consolidate(words: list[str]) -> None:
    """A world that plays anywhere, or one .safetensors file, from all ranks' parts: <checkpoint> out=..."""
    from train.checkpoint import consolidate

    consolidate(words)


def _engine(words: list[str]) -> None:
    """Print what a run's engine would be told, without starting it: the same words as for training"""
    import json

    from configs import load_config
    from train.config import TrainConfig
    from train.engine import describe_engine

    print(json.dumps(describe_engine(load_config(TrainConfig, words)), indent=2))


VERBS = {"run": _train, "engine": _engine, "codec": _codec, "consolidate": first_is("checkpoint", _consolidate)}

if __name__ == "__main__":
    sys.exit(run("train", VERBS, default="run"))
