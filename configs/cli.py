"""The one entry form: `python -m <folder> <verb> file.yaml ... key=value ...`."""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path

from configs.words import at_home

# torch's CPU build reads these when it is loaded, after this module in every program that trains or samples. It spins
# by default: with another job on the cores, one step took 21 s so and 2 s waiting passively.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

Verb = Callable[[list[str]], int | None]

# What a person's input can cause: printed as one line, exit 2. Everything else is a bug and keeps its traceback.
PERSONS_FAULTS = (ValueError, OSError)
MOST_SAID = 2000  # characters of an error


def run(program: str, verbs: Mapping[str, Verb], words: Sequence[str] | None = None, default: str | None = None) -> int:
    """Runs the verb that `words` (default: the command line) begin with and returns the exit status.

    Words that begin with a setting instead are those of the verb `default`.

    A person's fault (ValueError, OSError) is one line on stderr and status 2; Ctrl-C is status 130.
    """
    words = [at_home(word) for word in (sys.argv[1:] if words is None else words)]
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text in this locale
    if default and words and _is_setting(words[0]):
        words.insert(0, default)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(program, verbs))
        return 0 if words else 2
    verb = verbs.get(words[0])
    if verb is None:
        print(f"{program}: no verb {words[0]!r}; there are: {', '.join(verbs)}", file=sys.stderr)
        return 2
    if words[1:2] in (["-h"], ["--help"]):
        print(f"python -m {program} {words[0]}: {verb.__doc__ or ''}")
        return 0
    try:
        return verb(words[1:]) or 0
    except PERSONS_FAULTS as error:
        print(f"{program} {words[0]}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _open_closed_streams() -> None:
    """Those that whoever started this program has closed lead nowhere: else a file of ours would get the number of one,
    and what libraries say there would be written into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            if (nowhere := os.open(os.devnull, os.O_RDWR)) != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _is_setting(word: str) -> bool:
    """Whether it is a YAML file or key=value, as load_config takes them; a path that is there is neither."""
    return word.endswith((".yaml", ".yml")) or ("=" in word and not Path(word).exists())


def first_is(name: str, verb: Verb) -> Verb:
    """The verb with its first word, if it is a bare path, read as `<name>=<path>`."""

    @wraps(verb)
    def with_name(words: list[str]) -> int | None:
        bare = bool(words) and not _is_setting(words[0])
        return verb([f"{name}={words[0]}", *words[1:]] if bare else words)

    return with_name


def one_line(error: BaseException) -> str:
    """An error as one line: what happened, without line breaks; of what quotes a whole file the two ends."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MOST_SAID else f"{said[: MOST_SAID // 2]} ... {said[-MOST_SAID // 2 :]}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as columns, the first one as their titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def usage(program: str, verbs: Mapping[str, Verb]) -> str:
    """The verbs with the first line of each one's docstring."""
    lines = [f"python -m {program} <verb> file.yaml ... key=value ...", ""]
    lines += [f"  {name:<10} {(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in verbs.items()]
    return "\n".join(lines)
