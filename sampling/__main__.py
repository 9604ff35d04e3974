"""`python -m sampling <verb> [checkpoint] file.yaml ... key=value ...`."""

import sys
from collections.abc import Callable
from functools import wraps

from configs.cli import run
from sampling.evaluate import evaluate
from sampling.generate import generate

Verb = Callable[[list[str]], None]


def of_checkpoint(verb: Verb) -> Verb:
    """The verb with its first word, if it is a bare path, read as `checkpoint=<path>`."""

    @wraps(verb)
    def with_checkpoint(words: list[str]) -> None:
        bare = bool(words) and "=" not in words[0] and not words[0].endswith((".yaml", ".yml"))
        verb([f"checkpoint={words[0]}", *words[1:]] if bare else words)

    return with_checkpoint


VERBS = {"generate": of_checkpoint(generate), "evaluate": of_checkpoint(evaluate)}

if __name__ == "__main__":
    sys.exit(run("sampling", VERBS))
