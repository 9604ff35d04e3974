"""`python -m sampling <verb> [checkpoint] file.yaml ... key=value ...`."""

import sys

from configs.cli import Verb, run

VERBS = {
    "generate": Verb("sampling.generate:generate", first="checkpoint"),
    "play": Verb("sampling.live.command:play_world", first="checkpoint"),
    "bench-play": Verb("tests.bench.playing:bench_play", first="checkpoint"),
    "evaluate": Verb("sampling.evaluate:evaluate", first="checkpoint"),
}

if __name__ == "__main__":
    sys.exit(run("sampling", VERBS))
