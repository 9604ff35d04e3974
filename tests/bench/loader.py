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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs import storage
from configs.errors import UserError
from data_pipeline.shard_set import Shards
from data_pipeline.stream import AHEAD, MOST_WORKERS, LoaderConfig, Stream

BLOCK = 1 << 20  # bytes of one read of the bare bytes
MOST_REPEATS = 10_000


@dataclass(frozen=True)
class BenchConfig:
    """`python -m data_pipeline bench MANIFEST`."""

    manifest: str
    batch: int = 4  # clips
    workers: tuple[int, ...] = (0, 1, 2)
    repeats: int = 3  # of everything, in turn
    megabytes: float = 1000.0  # of clips that each row reads, at most
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        positive = self.batch > 0 and 0 < self.repeats <= MOST_REPEATS and 0 < self.megabytes < float("inf")
        if not positive or not self.workers or not 0 <= min(self.workers) <= max(self.workers) <= MOST_WORKERS:
            raise UserError(
                f"batch={self.batch}, repeats={self.repeats} and megabytes={self.megabytes:g} must be positive, "
                f"repeats at most {MOST_REPEATS}, workers={list(self.workers)} numbers from 0 to {MOST_WORKERS}"
            )


def bench(config: BenchConfig) -> None:
    """How fast a set's stream is beside its bare bytes: bench MANIFEST batch=4 workers=[0,1]"""
    shards = Shards(config.manifest, verify=False)
    bytes_per_clip = sum(entry.size for _, entry in shards.places) / len(shards)
    clips = min(len(shards), max(config.batch, int(config.megabytes * 1e6 / bytes_per_clip)))
    clips -= clips % config.batch
    if not clips:
        raise UserError(
            f"{config.manifest} has {len(shards)} clips, fewer than batch={config.batch}; use a smaller one"
        )
    print(
        f"{config.manifest}: {clips} of {len(shards)} clips of {bytes_per_clip / 1e6:.2f} MB, batches of {config.batch}"
    )
    speeds = measure_speeds(config, shards, clips)
    print(f"{'':28} {'clips/s':>9} {'MB/s':>9} {'of one MB':>10} {'of memory':>10}")
    one, memory = list(speeds.values())[:2]
    for name, speed in speeds.items():
        rates = f"{speed:9.0f} {speed * bytes_per_clip / 1e6:9.0f}"
        print(f"{name:28} {rates} {speed / one:10.0%} {speed / memory:10.0%}")


def measure_speeds(config: BenchConfig, shards: Shards, clips: int) -> dict[str, float]:
    """Clips per second of each row: the median of `repeats` runs, which take turns."""
    streams = {n: Stream(config.manifest, config.batch, 0, workers=n, loader=config.loader) for n in config.workers}
    blocks = np.empty((buffers_held(config, shards), BLOCK), np.uint8)
    with TemporaryDirectory() as scratch:
        rows: dict[str, Callable[[], float]] = {
            "bare bytes, into one MB": lambda: timed(read_bare, shards, clips, blocks[:1]),
            "bare bytes, into memory": lambda: timed(read_bare, shards, clips, blocks),
        }
        rows |= {f"stream, {n} workers": lambda n=n: time_stream(streams[n], clips) for n in config.workers}
        mapped = write_mapped(shards, clips, Path(scratch) / "clips.safetensors")
        rows["mapped safetensors, stacked"] = lambda: timed(read_mapped, mapped, clips, config.batch)
        times: dict[str, list[float]] = {name: [] for name in rows}
        for run in rows.values():
            run()  # warms the page cache
        for _ in range(config.repeats):
            for name, run in rows.items():
                times[name].append(run())
    return {name: clips / statistics.median(taken) for name, taken in times.items()}


def timed(run: Callable[..., object], *given: object) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run(*given)
    return time.perf_counter() - began


def buffers_held(config: BenchConfig, shards: Shards) -> int:
    """How many blocks take as much memory as the batches between a stream and who trains on them."""
    in_batch = config.batch * max(entry.size for _, entry in shards.places)
    return -(-in_batch * (AHEAD + 1) // BLOCK)


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


def write_mapped(shards: Shards, clips: int, path: Path) -> Path:
    """One safetensors file with the latents and actions of the first `clips` clips."""
    found = {f"{i}.{name}": tensor for i in range(clips) for name, tensor in shards.read(i).items()}
    try:
        save_file(found, path)
    except SafetensorError as error:
        raise OSError(
            f"cannot write {clips} clips to {path.parent}: {error}; set TMPDIR to a folder with room, or a smaller "
            "megabytes="
        ) from error
    return path


def read_mapped(path: Path, clips: int, batch: int) -> None:
    """Every clip of a file of `write_mapped`, by memory mapping, stacked into batches."""
    with safe_open(path, "pt") as file:
        names = [name.partition(".")[2] for name in file.keys() if name.startswith("0.")]  # noqa: SIM118
        for first in range(0, clips, batch):
            for name in names:
                torch.stack([file.get_tensor(f"{i}.{name}") for i in range(first, first + batch)])
