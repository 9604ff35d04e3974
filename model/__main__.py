"""`python -m model <verb>`: what a model is, whether it equals the reference, how fast it is, official files."""

import sys

from configs.cli import Verb, run

VERBS = {
    "info": Verb("model.info:info"),
    "parity": Verb("tests.parity.run:parity"),
    "bench": Verb("tests.bench.network:bench"),
    "import": Verb("model.convert:import_official", first="file"),
    "export": Verb("model.convert:export", first="checkpoint"),
}

if __name__ == "__main__":
    sys.exit(run("model", VERBS))
