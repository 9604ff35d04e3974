"""`python -m train file.yaml ... key=value ...` trains; `python -m train codec ...` fits the demo's codec."""

import os
import signal
import sys
import time

from configs.cli import PERSONS_FAULTS, run


def _train(words: list[str]) -> None:
    """Train a world model on latent shards (the default: a word that is no verb begins its settings)."""
    from train.loop import train

    try:
        train(words)
    except PERSONS_FAULTS:
        # Every rank meets the same fault: rank 0 says it, and the launcher ends the others while they wait here.
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        raise


def _codec(words: list[str]) -> None:
    """Fit the demo's codec to recordings: PCA encoder, learned decoder; prints PSNR on held-out episodes."""
    from train.codec import train_codec

    train_codec(words)


VERBS = {"run": _train, "codec": _codec}

if __name__ == "__main__":
    given = sys.argv[1:]
    begins_with_settings = bool(given) and (given[0].endswith((".yaml", ".yml")) or "=" in given[0])
    sys.exit(run("train", VERBS, ["run", *given] if begins_with_settings else given))
