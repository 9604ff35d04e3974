"""`encode` in processes of its own, some of which kill themselves at a named moment."""

import os
import subprocess
import sys
import time
from pathlib import Path

from configs import to_dict
from data_pipeline.plan import EncodeConfig

# Runs the command line and kills itself at the n-th call of one function, before or after it did its work; with two,
# at the n-th call of the second one since the first was called.
DIES = """
import os, signal, sys
from functools import reduce
from importlib import import_module
from configs.cli import run

*first, last, call, when = sys.argv[1].split("|")
awaited, calls = set(first), []

def watch(name):
    module, _, path = name.partition(":")
    *path, attribute = path.split(".")
    owner = reduce(getattr, path, import_module(module))
    original = getattr(owner, attribute)

    def watched(*args, **settings):
        awaited.discard(name)
        calls.extend([1] if name == last and not awaited else [])
        dies = name == last and len(calls) == int(call)
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **settings)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, watched)

for name in (*first, last):
    watch(name)
from data_pipeline.__main__ import VERBS
sys.exit(run("data_pipeline", VERBS, sys.argv[2:]))
"""

MOMENTS = {
    "reading frames": "data_pipeline.readers:fit_frame|20|before",
    "encoding": "data_pipeline.clips:Encoder.latents|2|before",
    "beginning a shard": "data_pipeline.encode:cut_episodes|2|before",
    "writing a shard": "data_pipeline.shards:pack_clip|3|after",
    "between shard and index": "data_pipeline.encode:write_shard|data_pipeline.shards:storage.write_text|1|before",
    "index written": "data_pipeline.encode:write_shard|1|after",
    "before the manifest": "data_pipeline.encode:save_manifest|1|before",
    "writing the manifest": "data_pipeline.encode:save_manifest|configs.files:os.replace|1|before",
    "between the manifests": "data_pipeline.encode:save_manifest|1|after",
}


def encode_args(config: EncodeConfig, game_yaml: str, *more: str, verb: str = "encode") -> list[str]:
    """The command line of a config."""
    settings = {key: value for key, value in to_dict(config).items() if key != "game" and value is not None}
    return [verb, game_yaml, *(f"{key}={value}" for key, value in settings.items()), *more]


def start(command: list[str], workers: int, rank: int) -> subprocess.Popen[str]:
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_workers(config: EncodeConfig, game_yaml: str, workers: int, dying: dict[int, str]) -> list[int]:
    """The exit statuses of `workers` processes, of which some die at a moment; the first has written a plan when the
    others are started, which else might leave it nothing to do."""
    plain = [sys.executable, "-m", "data_pipeline", *encode_args(config, game_yaml)]
    started: list[subprocess.Popen[str]] = []
    for rank in range(workers):
        moment = dying.get(rank)
        line = [sys.executable, "-c", DIES, MOMENTS[moment], *encode_args(config, game_yaml)] if moment else plain
        started.append(start(line, workers, rank))
        while dying and rank == 0 and started[0].poll() is None and not list(Path(config.out).glob("*/plan.json")):
            time.sleep(0.005)
    return [worker.wait(timeout=120) for worker in started]
