"""Damaged and hostile files and settings, thousands of them: `python tests/fuzz.py seconds=600`; one again: only=.

Every input must end with success, or with status 2 and one line: never with a traceback, more than 20 s of work, more
than 2 GiB of memory, a write outside of its folder, or something half-written under a final name.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil
from fuzz_mutations import change_file
from fuzz_targets import TARGETS, Target

from configs import load_config
from configs.cli import Verb, run

WORK_S, WALL_S, MEMORY_GIB = 20, 90, 2.0  # the wall's limit is for a shared machine
TOO_MUCH = {-signal.SIGPROF: f"more than {WORK_S} s of work", -signal.SIGALRM: f"more than {WALL_S} s"}


@dataclass(frozen=True)
class FuzzConfig:
    """The settings of `python tests/fuzz.py`."""

    seconds: float = 60
    seed: int | None = None  # of the first input; printed, as it is drawn from the clock if not given
    only: str | None = None  # TARGET:SEED of one input that is to be tried again, or a TARGET


class Tried(NamedTuple):
    """One input and what came of it."""

    target: str
    seed: int
    outcome: str  # "success", "one line", or what must not be
    output: str = ""


def main(args: list[str]) -> int:
    """Tries inputs until the time is over; 1 if one of them ended as none may."""
    config = load_config(FuzzConfig, args)
    name, _, again = (config.only or "").partition(":")
    targets = [target for target in TARGETS if name in ("", target.name)]
    if not targets:
        raise ValueError(f"no target {name!r}; there are: {', '.join(target.name for target in TARGETS)}")
    seed = int(again) if again else config.seed if config.seed is not None else int(time.time())
    print(f"fuzz: seed={seed}, {', '.join(target.name for target in targets)}", flush=True)
    counts, wrong, began = Counter[tuple[str, str]](), 0, time.monotonic()
    for tried in supervised(targets, seed, 1 if again else 10**9, began + config.seconds):
        counts[tried.target, tried.outcome] += 1
        if tried.outcome not in ("success", "one line"):
            wrong += 1
            print(f"{tried.outcome}: python tests/fuzz.py only={tried.target}:{tried.seed}\n{tried.output}", flush=True)
        elif again:
            print(f"{tried.outcome}: {tried.output}")
    for target in targets:
        ended = ", ".join(f"{count} {what}" for (name, what), count in sorted(counts.items()) if name == target.name)
        print(f"{target.name:>12}: {ended}")
    print(f"fuzz: {counts.total()} inputs in {time.monotonic() - began:.0f} s, {wrong} of them wrong, seed={seed}")
    return int(bool(wrong))


def supervised(targets: list[Target], seed: int, count: int, until: float) -> Iterator[Tried]:
    """What came of each input, tried in a process that is replaced after an input that killed it."""
    done = 0
    while time.monotonic() < until and done < count:
        names = ",".join(target.name for target in targets)
        command = [sys.executable, __file__, "try", names, str(seed), str(done), str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            begun: list[Any] = []
            for line in process.stdout or ():
                if not begun:
                    begun = json.loads(line)
                    continue
                begun, done = [], done + 1
                yield Tried._make(json.loads(line))
                if time.monotonic() > until:
                    process.kill()
                    return
        if begun:
            done += 1
            outcome = TOO_MUCH.get(process.returncode, f"the process ended with {process.returncode}")
            yield Tried(begun[0], begun[1], outcome)
        elif not done:
            raise ChildProcessError(f"no input could be tried; run {' '.join(command)}")


def try_inputs(names: str, seed: int, first: int, count: int) -> None:
    """The child's part: prints which input it begins with, and what came of it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    targets = [target for target in TARGETS if target.name in names.split(",")]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        os.environ |= {"HOME": f"{root}/home", "TMPDIR": f"{root}/tmp", "WORLDLOOM_CACHE": f"{root}/cache"}
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{root}/cache/inductor", "S3_ENDPOINT_URL": "http://127.0.0.1:9"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "SEKRIT"}
        for name in ("home", "tmp", "good"):
            Path(root, name).mkdir()
        tempfile.tempdir = f"{root}/tmp"
        for target in targets:
            target.prepare(Path(root, "good", target.name))
        most = psutil.Process().memory_info().vms + int((MEMORY_GIB + 1) * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))  # what wants far too much gets a MemoryError
        writes: list[str] = []
        _watch_writes(writes)
        for i in range(first, count):
            target, number = targets[i % len(targets)], seed + i // len(targets)
            print(json.dumps([target.name, number]), file=out, flush=True)
            # The signals of these timers kill the process, whatever code it is in.
            signal.setitimer(signal.ITIMER_PROF, WORK_S)
            signal.setitimer(signal.ITIMER_REAL, WALL_S)
            print(json.dumps(try_one(target, number, Path(root), writes)), file=out, flush=True)


def _watch_writes(writes: list[str]) -> None:
    """Notes every path that Python opens to write, makes, moves or removes."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.link", "os.symlink"):
            writes.append(os.fsdecode(args[1]))
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            writes.append(os.fsdecode(args[0]) if not isinstance(args[0], int) else "")
        elif event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            writes.append(os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else "")

    sys.addaudithook(hook)


def try_one(target: Target, seed: int, root: Path, writes: list[str]) -> Tried:
    """One input: good files, of which one is changed, and what the program makes of them."""
    rng = Random(f"{target.name} {seed}")
    folder = root / "input"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "good" / target.name, folder / "given")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret").write_text("theirs")
    files = sorted(path for path in (folder / "given").rglob("*") if path.is_file() and target.changes(path))
    if files:
        change_file(rng.choice(files), rng)
    before, memory = _contents(folder), _peak_gib(reset=True)
    writes.clear()
    os.chdir(folder)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            status = run("fuzz", {target.name: Verb(lambda args: target.deed(folder / "given", rng))}, [target.name])
    except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
        return Tried(target.name, seed, "traceback", traceback.format_exc()[-3000:])
    line = next((line for line in output.getvalue().splitlines() if line.startswith(f"fuzz {target.name}:")), "")
    outcome = "success" if status in target.fine else "one line" if status == 2 and line else f"status {status}"
    after = _contents(folder)
    changed = [name for name in before if before[name] != after.get(name)]
    elsewhere = [path for path in writes if not _inside(path, folder, root)]
    if elsewhere or {name for name in before | after if name.startswith("outside/")} != {"outside/secret"}:
        outcome = f"a write outside of its folder: {elsewhere[:3]}"
    elif changed and not target.goes_on:
        outcome = f"a file that was given is another one: {changed[:3]}"
    elif status == 2 and not target.goes_on and after.keys() - before.keys():
        outcome = f"left after an error: {sorted(after.keys() - before.keys())[:3]}"
    elif "SEKRIT" in output.getvalue():
        outcome = "a secret was printed"
    elif _peak_gib() - memory > MEMORY_GIB:
        outcome = f"more than {MEMORY_GIB} GiB"
    return Tried(target.name, seed, outcome, line or output.getvalue()[-500:])


def _inside(path: str, folder: Path, root: Path) -> bool:
    if path in ("", os.devnull) or "/__pycache__" in path or path.startswith(("/dev/", "/proc/", "/sys/")):
        return True
    real = Path(os.path.realpath(folder / path))
    allowed = (folder, *(root / name for name in ("tmp", "home", "cache")))
    return any(map(real.is_relative_to, allowed)) and not real.is_relative_to(folder / "outside")


def _contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _peak_gib(reset: bool = False) -> float:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 2**20


if __name__ == "__main__":
    if sys.argv[1:2] == ["try"]:
        try_inputs(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        sys.exit(run("fuzz", {"run": Verb(main)}, ["run", *sys.argv[1:]]))
