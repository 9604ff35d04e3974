"""A pipeline: commands that a person could type, run one after the other; those that are done are skipped."""

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

from configs import build_from, load_config
from configs.cli import table
from configs.errors import UserError
from configs.lease import sole_writer
from configs.storage import is_s3, write_text
from configs.untrusted import parse_object
from launch.local import wait
from model.limits import Precision, faster_precision

STAMPS = ".pipeline"  # folder in `out`


@dataclass(frozen=True)
class Stage:
    """One command, and the path that shows that it is done; both are shell words."""

    name: str
    command: str
    output: str  # no other stage writes it
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineConfig:
    """`configs/pipelines/*.yaml`."""

    out: str  # folder of everything the stages write
    stages: tuple[Stage, ...]
    opens: str  # the file to look at in the end
    precision: Precision = "auto"  # for `${precision}`; auto is this processor's, measured once
    env: dict[str, str] = field(default_factory=dict)  # of every stage

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two stages are called {twice}; give each a name of its own")


@dataclass(frozen=True)
class Stamp:
    """What a stage was run with, written when it begins and again when it has succeeded."""

    command: str
    key: str  # see `stage_key`
    seconds: float | None = None  # None: not finished


def pipeline(args: list[str]) -> int:
    """Run the stages of a pipeline; those that are done with the same commands and YAML files are reused."""
    config = load_config(PipelineConfig, args)
    if is_s3(config.out):
        raise UserError(f"out={config.out}: a pipeline runs in a folder of this machine, not in a bucket")
    stamps = Path(config.out) / STAMPS
    with sole_writer(stamps, "pipeline"):  # a second one would set aside what the first is writing
        if config.precision == "auto":
            args = [*args, f"precision={stored_precision(stamps / 'precision')}"]
        # Quoted, since it becomes part of shell words: a folder `a b` stays one word.
        config = load_config(PipelineConfig, [*args, f"out={shlex.quote(config.out)}"])
        for stage in config.stages:
            try:
                shlex.split(stage.command)
            except ValueError as error:
                raise UserError(f"stage {stage.name}: its command cannot be read: {error}") from error
        return _run_stages(config, stamps)


def _run_stages(config: PipelineConfig, stamps: Path) -> int:
    rows, stamp, total = [["stage", "seconds", ""]], None, 0.0
    for number, stage in enumerate(config.stages, 1):
        title, file = f"[{number}/{len(config.stages)}] {stage.name}", stamps / f"{stage.name}.json"
        output, key = Path(*shlex.split(stage.output)), stage_key(stage, stamp)
        stamp = build_from(Stamp, parse_object(file.read_bytes(), file), file) if file.is_file() else None
        if stamp and stamp.key == key and stamp.seconds is not None and output.exists():
            print(f"{title}: complete, reused", flush=True)
            rows.append([stage.name, f"{stamp.seconds:.1f}", "(earlier, reused)"])
        else:
            print(f"\n{title}: {stage.command}", flush=True)
            if stamp and stamp.key != key and output.exists():
                print(f"{title}: what it made with other settings or inputs is now {set_aside(output)}")
            stamp = Stamp(stage.command, key)
            write_text(file, json.dumps(asdict(stamp)))
            started = time.perf_counter()
            if status := run_command(stage, config.env):
                print(f"{title} failed with status {status}; fix it and run the same command again", file=sys.stderr)
                return status
            if not output.exists():
                print(f"{title} succeeded but made no {output}", file=sys.stderr)
                return 1
            stamp = replace(stamp, seconds=time.perf_counter() - started)
            write_text(file, json.dumps(asdict(stamp)))
            rows.append([stage.name, f"{stamp.seconds:.1f}", ""])
        total += stamp.seconds or 0.0
    print(f"\n{table([*rows, ['all', f'{total:.1f}', '']])}\n\nopen {config.opens}")
    return 0


def run_command(stage: Stage, env: dict[str, str]) -> int:
    """Exit status of the stage's command; its output goes straight through."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return wait(subprocess.Popen(shlex.split(stage.command), env={**os.environ, **env, **stage.env, "PATH": path}))


def stage_key(stage: Stage, before: Stamp | None) -> str:
    """What decides whether an earlier output is still this stage's: its command, the YAML files that it names, and the
    run of the stage before (whose seconds tell one run from another)."""
    files = [Path(word) for word in shlex.split(stage.command) if word.endswith((".yaml", ".yml"))]
    contents = [path.read_text("utf-8", "surrogateescape") for path in files if path.is_file()]
    return hashlib.sha256(json.dumps([stage.command, contents, before and asdict(before)]).encode()).hexdigest()[:16]


def set_aside(path: Path) -> Path:
    """Renames `path` to the first free name with a number before its suffix, as demo.1.mp4, and returns that."""
    numbered = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in itertools.count(1))
    return path.rename(next(other for other in numbered if not other.exists()))


def stored_precision(path: Path) -> str:
    """The faster one, measured once and kept in `path`: a stage that resumes must not change its precision."""
    if not path.is_file():
        write_text(path, faster_precision("cpu"))
    return path.read_text().strip()
