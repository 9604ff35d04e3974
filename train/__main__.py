"""`python -m train file.yaml ... key=value ...` trains; `engine`, `codec` and `consolidate` are verbs of their own."""

import sys

from configs.cli import Verb, run

VERBS = {
    "run": Verb("train.loop:main"),
    "engine": Verb("train.engines:print_engine"),
    "codec": Verb("train.codec:train_codec"),
    "consolidate": Verb("train.checkpoint:consolidate", first="checkpoint"),
}

if __name__ == "__main__":
    sys.exit(run("train", VERBS, default="run"))
