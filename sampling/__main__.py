"""`python -m sampling <verb> [checkpoint] file.yaml ... key=value ...`."""

import sys

from configs.cli import first_is, run
from sampling.evaluate import evaluate
from sampling.generate import generate

VERBS = {"generate": first_is("checkpoint", generate), "evaluate": first_is("checkpoint", evaluate)}

if __name__ == "__main__":
    sys.exit(run("sampling", VERBS))
