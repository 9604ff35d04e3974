"""`python -m sampling <verb> [checkpoint] file.yaml ... key=value ...`."""

import sys

from configs.cli import of_checkpoint, run
from sampling.evaluate import evaluate
from sampling.generate import generate

VERBS = {"generate": of_checkpoint(generate), "evaluate": of_checkpoint(evaluate)}

if __name__ == "__main__":
    sys.exit(run("sampling", VERBS))
