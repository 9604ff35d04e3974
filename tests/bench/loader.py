"""How fast a shard set is read: the stream against the bare bytes and memory-mapped safetensors, in one run."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from configs import storage, within
from configs.errors import UserError
from data_pipeline.shard_set import Shards
from data_pipeline.stream import AHEAD, LoaderConfig, Stream

BLOCK = 1 << 20  # bytes of one read of the bare bytes


@dataclass(frozen=True)
class BenchConfig:
    """`python -m data_pipeline bench MANIFEST`."""

    manifest: str
    batch: int = within(1, 1 << 20, 4)  # clips
    workers: tuple[int, ...] = within(0, 1024, (0, 1, 2))
    repeats: int = within(1, 10_000, 3)  # of everything, in turn
    megabytes: float = within(1e-6, 1e9, 1000.0)  # of clips that each row reads, at most
    loader: LoaderConfig = field(default_factory=LoaderConfig)


def bench(config: BenchConfig) -> None:
    """How fast a set's stream is beside its bare bytes: bench MANIFEST batch=4 workers=[0,1]"""
    shards = Shards(config.manifest, verify=False)
    clip_mb = sum(entry.size for _, entry in shards.places) / len(shards) / 1e6
    clips = min(len(shards), max(config.batch, int(config.megabytes / clip_mb)))
    clips -= clips % config.batch
    if not clips:
        raise UserError(f"{config.manifest} has {len(shards)} clips, fewer than batch={config.batch}; lower it")
    print(f"{config.manifest}: {clips} of {len(shards)} clips of {clip_mb:.2f} MB, batches of {config.batch}")
    speeds = measure_speeds(config, shards, clips)
    print(f"{'':28} {'clips/s':>9} {'MB/s':>9} {'of one MB':>10} {'of memory':>10}")
    one_mb, memory = list(speeds.values())[:2]
    for name, speed in speeds.items():
        print(f"{name:28} {speed:9.0f} {speed * clip_mb:9.0f} {speed / one_mb:10.0%} {speed / memory:10.0%}")


def measure_speeds(config: BenchConfig, shards: Shards, clips: int) -> dict[str, float]:
    """Clips per second of each row: the median of `repeats` runs, which take turns."""
    streams = {n: Stream(config.manifest, config.batch, 0, workers=n, loader=config.loader) for n in config.workers}
    # As much memory as the batches between a stream and who trains on them.
    in_batch = config.batch * max(entry.size for _, entry in shards.places)
    blocks = np.empty((-(-in_batch * (AHEAD + 1) // BLOCK), BLOCK), np.uint8)
    with TemporaryDirectory() as scratch:
        rows: dict[str, Callable[[], float]] = {
            "bare bytes, into one MB": lambda: timed(read_bare, shards, clips, blocks[:1]),
            "bare bytes, into memory": lambda: timed(read_bare, shards, clips, blocks),
        }
        rows |= {f"stream, {n} workers": lambda n=n: time_stream(streams[n], clips) for n in config.workers}
        mapped = Path(scratch) / "clips.safetensors"
        save_file({f"{i}.{name}": tensor for i in range(clips) for name, tensor in shards.read(i).items()}, mapped)
        rows["mapped safetensors, stacked"] = lambda: timed(read_mapped, mapped, clips, config.batch)
        turns = [{name: run() for name, run in rows.items()} for _ in range(1 + config.repeats)]
    # The first turn warms the page cache.
    return {name: clips / statistics.median(turn[name] for turn in turns[1:]) for name in rows}


def timed(run: Callable[..., object], *given: object) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run(*given)
    return time.perf_counter() - began


def read_bare(shards: Shards, clips: int, blocks: np.ndarray) -> None:
    """The bytes of the first `clips` clips' shards, as far as they hold these, in order, into the blocks in turn.

    With one block they end where the next ones do, in the processor's cache; with many in memory, as a batch must.
    """
    left = sum(entry.size for _, entry in shards.places[:clips])
    turns = cycle(block.data for block in blocks)
    for shard in shards.shards:
        with storage.open(shard.url) as file:
            while left > 0 and (read := file.readinto(next(turns))):
                left -= read


def time_stream(stream: Stream, clips: int) -> float:
    """Seconds of the stream's next `clips` clips, when those that it had read ahead are used up."""
    with closing(stream.batches()) as batches:
        deque(islice(batches, 2 * AHEAD), maxlen=0)
        return timed(lambda: deque(islice(batches, clips // stream.batch), maxlen=0))


def read_mapped(path: Path, clips: int, batch: int) -> None:
    """The clips of a file of tensors `<clip>.<name>`, by memory mapping, stacked into batches."""
    with safe_open(path, "pt") as file:
        names = [name.partition(".")[2] for name in file.keys() if name.startswith("0.")]  # noqa: SIM118
        for first in range(0, clips, batch):
            for name in names:
                torch.stack([file.get_tensor(f"{i}.{name}") for i in range(first, first + batch)])
