"""How fast a shard set is read: the stream against the bare bytes and memory-mapped safetensors, in one run."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from configs import load_config
from data_pipeline import storage
from data_pipeline.shards import shard_url
from data_pipeline.stream import LoaderConfig, Shards, Stream

BLOCK = 1 << 20  # bytes of one read of the bare bytes


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
        if self.batch < 1 or self.repeats < 1 or self.megabytes <= 0 or not self.workers or min(self.workers) < 0:
            raise ValueError(
                f"batch={self.batch}, repeats={self.repeats} and megabytes={self.megabytes:g} must be positive, "
                f"workers={list(self.workers)} one or more numbers from 0 on"
            )


def bench(words: list[str]) -> None:
    """How fast a set's stream is beside its bare bytes: bench MANIFEST batch=4 workers=[0,1]"""
    config = load_config(BenchConfig, words)
    shards = Shards(config.manifest)
    bytes_per_clip = sum(entry.size for _, entry in shards.places) / len(shards)
    clips = min(len(shards), max(config.batch, int(config.megabytes * 1e6 / bytes_per_clip)))
    clips -= clips % config.batch
    if not clips:
        raise ValueError(
            f"{config.manifest} has {len(shards)} clips, fewer than batch={config.batch}; use a smaller one"
        )
    print(
        f"{config.manifest}: {clips} of {len(shards)} clips of {bytes_per_clip / 1e6:.2f} MB, batches of {config.batch}"
    )
    print(f"{'':28} {'clips/s':>9} {'MB/s':>9} {'of bare bytes':>14}")
    bare = 0.0
    for name, speed in measured(config, shards, clips):
        bare = bare or speed * bytes_per_clip
        print(f"{name:28} {speed:9.0f} {speed * bytes_per_clip / 1e6:9.0f} {speed * bytes_per_clip / bare:14.0%}")


def measured(config: BenchConfig, shards: Shards, clips: int) -> Iterator[tuple[str, float]]:
    """Name and clips per second of each row: the median of `repeats` runs, which take turns."""
    streams = {n: Stream(config.manifest, config.batch, 0, workers=n, loader=config.loader) for n in config.workers}
    with TemporaryDirectory() as scratch:
        rows: dict[str, Callable[[], None]] = {"bare bytes, in order": lambda: read_bare(shards, clips)}
        rows |= {f"stream, {n} workers": lambda n=n: read_stream(streams[n], clips) for n in config.workers}
        mapped = write_mapped(shards, clips, Path(scratch) / "clips.safetensors")
        rows["mapped safetensors, stacked"] = lambda: read_mapped(mapped, clips, config.batch)
        times: dict[str, list[float]] = {name: [] for name in rows}
        for run in rows.values():
            run()  # warms the page cache, and compares the shards' SHA-256
        for _ in range(config.repeats):
            for name, run in rows.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
    return ((name, clips / statistics.median(taken)) for name, taken in times.items())


def read_bare(shards: Shards, clips: int) -> None:
    """The bytes of the first `clips` clips' shards, as far as they hold these clips, in order, into one buffer."""
    left = sum(entry.size for _, entry in shards.places[:clips])
    buffer = memoryview(bytearray(BLOCK))
    for path, info in shards.shards:
        with storage.opened(shard_url(path, info), BLOCK) as file:
            while left > 0 and (read := file.readinto(buffer)):
                left -= read


def read_stream(stream: Stream, clips: int) -> None:
    """The first `clips` clips of the stream."""
    batches = stream.batches()
    for _ in islice(batches, clips // stream.batch):
        pass
    batches.close()


def write_mapped(shards: Shards, clips: int, path: Path) -> Path:
    """One safetensors file with the latents and actions of the first `clips` clips."""
    found = {f"{i}.{name}": tensor for i in range(clips) for name, tensor in shards.read(i).items()}
    save_file(found, path)
    return path


def read_mapped(path: Path, clips: int, batch: int) -> None:
    """Every clip of a file of `write_mapped`, by memory mapping, stacked into batches."""
    with safe_open(path, "pt") as file:
        names = [name.partition(".")[2] for name in file.keys() if name.startswith("0.")]  # noqa: SIM118
        for first in range(0, clips, batch):
            for name in names:
                torch.stack([file.get_tensor(f"{i}.{name}") for i in range(first, first + batch)])
