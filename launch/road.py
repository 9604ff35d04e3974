"""A road: stages one after the other, each a command a person could type, each skipped when it is done."""

import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from configs import build_from, load_config
from configs.errors import UserError
from configs.files import sole_writer, write_text
from configs.foreign import parse_object, reading, require_inside
from configs.storage import is_s3
from launch.precision import precision_of_road

STAMPS = ".road"


@dataclass(frozen=True)
class Stage:
    """One command and what shows that it is done."""

    name: str
    command: str
    makes: str  # the path that it fills, and no other stage does
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_inside(self.name, "the road")  # it names a file

    @property
    def line(self) -> list[str]:
        """The command's words. Raises ValueError in one line."""
        try:
            if words := shlex.split(self.command):
                return words
            raise UserError("it is empty")
        except ValueError as error:
            raise UserError(f"stage {self.name}: its command cannot be read: {error}") from error


@dataclass(frozen=True)
class RoadConfig:
    """What `python -m launch road` is told."""

    out: str  # folder of everything the stages write
    stages: tuple[Stage, ...]
    opens: str  # the file to look at in the end
    precision: Literal["fp32", "bf16", "auto"] = "auto"  # for `${precision}`; auto: the faster one here, measured once
    env: dict[str, str] = field(default_factory=dict)  # of every stage

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two stages are called {twice}; give each a name of its own")


@dataclass(frozen=True)
class Stamp:
    """What a stage was run with, written when it begins and again when it has ended well."""

    command: str
    key: str  # of the command, the contents of its YAML files and the stage before
    seconds: float | None = None  # None: not ended


def road(words: list[str]) -> int:
    """Run the stages of a road; those that are done with the same commands and YAML files are reused."""
    config = load_config(RoadConfig, words)
    if is_s3(config.out):
        raise UserError(f"out={config.out}: a road is walked in a folder of this machine, not in a bucket")
    with sole_writer(Path(config.out) / STAMPS, "road"):  # another one might set aside what is being written here
        return _walk(config, words)


def _walk(config: RoadConfig, words: list[str]) -> int:
    if config.precision == "auto":
        precision = precision_of_road(Path(config.out) / STAMPS)
        print(f"precision: {precision}, the faster one on this machine")
        words = [*words, f"precision={precision}"]
        config = load_config(RoadConfig, words)
    config = _quoted(config, words)
    lines, before = [], None
    for i, stage in enumerate(config.stages, 1):
        path, stamp, key = stamp_path(config, stage), read_stamp(config, stage), key_of(stage, before)
        title = f"[{i}/{len(config.stages)}] {stage.name}"
        if stamp is None or stamp.key != key or stamp.seconds is None or not Path(stage.makes).exists():
            print(f"\n{title}: {stage.command}", flush=True)
            if stamp and stamp.key != key and Path(stage.makes).exists():
                print(f"{title}: what it made with other settings or inputs is now {set_aside(Path(stage.makes))}")
            write_text(path, json.dumps(asdict(Stamp(stage.command, key))))
            status, seconds = run_stage(config, stage)
            if status:
                print(f"{title} failed with status {status}; mend it and run the same command again", file=sys.stderr)
                return status
            if not Path(stage.makes).exists():
                print(f"{title} ended well but made no {stage.makes}", file=sys.stderr)
                return 1
            stamp = Stamp(stage.command, key, seconds)
            write_text(path, json.dumps(asdict(stamp)))
            print(f"{title}: done in {seconds:.0f} s", flush=True)
            lines.append((stage.name, seconds, ""))
        else:
            print(f"{title}: complete, reused", flush=True)
            lines.append((stage.name, stamp.seconds, "  (earlier, reused)"))
        before = stamp
    print(f"\n{'stage':<20} {'seconds':>8}")
    for name, seconds, note in [*lines, ("all", sum(seconds for _, seconds, _ in lines), "")]:
        print(f"{name:<20} {seconds:8.1f}{note}")
    print(f"\nopen {config.opens}")
    return 0


def _quoted(config: RoadConfig, words: list[str]) -> RoadConfig:
    """A command is a line of shell words: `out` in it is quoted, so that a folder `a b` stays one word.

    Raises ValueError in one line for a command that is none."""
    stages = load_config(RoadConfig, [*words, f"out={shlex.quote(config.out)}"]).stages
    found = tuple(replace(one, command=other.command) for one, other in zip(config.stages, stages, strict=True))
    for stage in found:
        _ = stage.line  # which raises
    return replace(config, stages=found)


def run_stage(config: RoadConfig, stage: Stage) -> tuple[int, float]:
    """Exit status and seconds of the stage's command, its output going straight through."""
    bin_folder = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        **config.env,
        **stage.env,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    started = time.perf_counter()
    process = subprocess.Popen(stage.line, env=env)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it got the same Ctrl-C, and saves
        status = 130
    return status, time.perf_counter() - started


def stamp_path(config: RoadConfig, stage: Stage) -> Path:
    return Path(config.out) / STAMPS / f"{stage.name}.json"


def read_stamp(config: RoadConfig, stage: Stage) -> Stamp | None:
    """What the stage was last run with, if it ever was. Raises ValueError in one line for a damaged file."""
    path = stamp_path(config, stage)
    if not path.is_file():
        return None
    with reading(path, "delete it, and the stage runs again"):
        return build_from(Stamp, parse_object(path.read_bytes(), path), path)


def key_of(stage: Stage, before: Stamp | None) -> str:
    """What decides whether an earlier output is still this stage's: its command, the YAML files that it names, and the
    run of the stage before (whose seconds tell one run from another)."""
    files = [Path(word) for word in stage.line if word.endswith((".yaml", ".yml"))]
    contents = [path.read_text("utf-8", "surrogateescape") for path in files if path.is_file()]
    return hashlib.sha256(json.dumps([stage.command, contents, before and asdict(before)]).encode()).hexdigest()[:16]


def set_aside(path: Path) -> Path:
    """Renames `path` to the first free name with a number before its suffix, as demo.1.mp4, and returns that."""
    others = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in itertools.count(1))
    free = next(other for other in others if not other.exists())
    path.rename(free)
    return free
