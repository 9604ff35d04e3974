"""The one entry form: `python -m <folder> <verb> file.yaml ... key=value ...`."""

import inspect
import io
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from configs import load_config
from configs.errors import is_users, one_line
from configs.files import config_files
from configs.overrides import YAML, expand_home

# torch's CPU build reads these when it is imported, after this module in every program that trains or samples. Its
# default is to spin: with another job on the cores, a step took 21 s with it and 2 s without.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")


@dataclass(frozen=True)
class Verb:
    """A command: a function, or its `module:name`, imported when it is run, that returns an exit status or None. It
    takes one config, a dataclass that is loaded from the arguments, or `args: list[str]`, the arguments themselves."""

    function: str | Callable[..., int | None]
    first: str | None = None  # the setting that a bare first argument stands for

    def load(self) -> Callable[[Any], int | None]:
        return pkgutil.resolve_name(self.function) if isinstance(self.function, str) else self.function


def run(program: str, verbs: Mapping[str, Verb], args: Sequence[str] | None = None, default: str | None = None) -> int:
    """Runs the verb that `args` (default: the command line) begin with and returns the exit status.

    Arguments that begin with a setting belong to the verb `default`. An error that the user can fix is one line on
    stderr and status 2; Ctrl-C is status 130.
    """
    args = [expand_home(arg) for arg in (sys.argv[1:] if args is None else args)]
    _prepare_streams()
    if default and args and is_setting(args[0]):
        args.insert(0, default)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(program, verbs))
        return 0 if args else 2
    if args[0] not in verbs:
        print(f"{program}: no verb {args[0]!r}; there are: {', '.join(verbs)}", file=sys.stderr)
        return 2
    verb = verbs[args[0]]
    if args[1:2] in (["-h"], ["--help"]):
        print(f"python -m {program} {args[0]}: {inspect.getdoc(verb.load())}")
        return 0
    try:
        return call(verb, args[1:]) or 0
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        print(f"{program} {args[0]}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def call(verb: Verb, args: list[str]) -> int | None:
    function = verb.load()
    if verb.first and args and not is_setting(args[0]):
        args = [f"{verb.first}={args[0]}", *args[1:]]
    config_files[:] = [arg for arg in args if arg.endswith(YAML) and Path(arg).is_file()]
    takes = next(iter(get_type_hints(function).values()), list[str])
    return function(args if takes == list[str] else load_config(takes, args))


def is_setting(arg: str) -> bool:
    """Whether `arg` is a YAML file or key=value, as `load_config` takes them; a path that is there is neither."""
    return arg.endswith(YAML) or ("=" in arg and not Path(arg).exists())


def _prepare_streams() -> None:
    """Opens streams that are closed, to nowhere: else a file of ours would get the number of one, and what libraries
    print would be written into it. Escapes what the locale cannot encode, such as a file's name."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - gets the lowest free number
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns; the first row holds their titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def usage(program: str, verbs: Mapping[str, Verb]) -> str:
    lines = [f"python -m {program} <verb> file.yaml ... key=value ...", ""]
    lines += [f"  {name:<12} {(verb.load().__doc__ or '').strip().splitlines()[0]}" for name, verb in verbs.items()]
    return "\n".join(lines)
