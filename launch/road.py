"""A road: stages one after the other, each a command a person could type, each skipped when it is done."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from configs import load_config
from configs.files import write_text
from launch.precision import precision_of_road

STAMPS = ".road"


@dataclass(frozen=True)
class Stage:
    """One command and what shows that it is done."""

    name: str
    command: str
    makes: str  # a path that exists afterwards
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoadConfig:
    """What `python -m launch road` is told."""

    out: str  # folder of everything the stages write
    stages: tuple[Stage, ...]
    opens: str  # the file to look at in the end
    precision: Literal["fp32", "bf16", "auto"] = "auto"  # for `${precision}`; auto: the faster one here, measured once
    env: dict[str, str] = field(default_factory=dict)  # of every stage


@dataclass(frozen=True)
class Stamp:
    """Written when a stage ended well."""

    command: str
    seconds: float


def road(words: list[str]) -> int:
    """Run the stages of a road; those that are done with the same command are reused."""
    config = load_config(RoadConfig, words)
    if config.precision == "auto":
        precision = precision_of_road(Path(config.out) / STAMPS)
        print(f"precision: {precision}, the faster one on this machine")
        config = load_config(RoadConfig, [*words, f"precision={precision}"])
    lines, behind_is_new = [], False
    for i, stage in enumerate(config.stages, 1):
        stamp = None if behind_is_new else read_stamp(config, stage)
        title = f"[{i}/{len(config.stages)}] {stage.name}"
        if stamp is None:
            print(f"\n{title}: {stage.command}", flush=True)
            status, seconds = run_stage(config, stage)
            if status:
                print(f"{title} failed with status {status}; mend it and run the same command again", file=sys.stderr)
                return status
            if not Path(stage.makes).exists():
                print(f"{title} ended well but made no {stage.makes}", file=sys.stderr)
                return 1
            stamp, behind_is_new = Stamp(stage.command, seconds), True
            write_text(stamp_path(config, stage), json.dumps(asdict(stamp)))
            print(f"{title}: done in {seconds:.0f} s", flush=True)
            lines.append((stage.name, stamp.seconds, ""))
        else:
            print(f"{title}: complete, reused", flush=True)
            lines.append((stage.name, stamp.seconds, "  (earlier, reused)"))
    print(f"\n{'stage':<20} {'seconds':>8}")
    for name, seconds, note in [*lines, ("all", sum(seconds for _, seconds, _ in lines), "")]:
        print(f"{name:<20} {seconds:8.1f}{note}")
    print(f"\nopen {config.opens}")
    return 0


def run_stage(config: RoadConfig, stage: Stage) -> tuple[int, float]:
    """Exit status and seconds of the stage's command, its output going straight through."""
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, **config.env, **stage.env, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    started = time.perf_counter()
    process = subprocess.Popen(shlex.split(stage.command), env=env)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it got the same Ctrl-C, and saves
        status = 130
    return status, time.perf_counter() - started


def stamp_path(config: RoadConfig, stage: Stage) -> Path:
    return Path(config.out) / STAMPS / f"{stage.name}.json"


def read_stamp(config: RoadConfig, stage: Stage) -> Stamp | None:
    """The stamp of a stage that is done with this very command and whose output is there."""
    path = stamp_path(config, stage)
    if not path.is_file() or not Path(stage.makes).exists():
        return None
    stamp = Stamp(**json.loads(path.read_text()))
    return stamp if stamp.command == stage.command else None
