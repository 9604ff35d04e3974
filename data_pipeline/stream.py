"""Manifests to batches: shuffled over all of them, exactly resumable, each clip read by its offset.

The order is a function of (seed, epoch) over all clips (`data_pipeline/order.py`). Sample g of the run is counted over
all ranks and epochs; micro-step m of rank r takes sample `(m * world + r) * batch` and the `batch - 1` after it. So a
position is one number, ranks never share a clip within an epoch, every clip comes once per epoch, and the order does
not depend on the number of ranks or workers. A batch that reaches the end of an epoch goes on with the next one.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from configs import within
from configs.errors import UserError
from data_pipeline.order import Order
from data_pipeline.prefetch import run_ahead
from data_pipeline.shard_set import Shards
from data_pipeline.shards import BatchBuffer
from data_pipeline.types import Batch, Source
from data_pipeline.verify import FAULT

AHEAD = 4  # batches


@dataclass(frozen=True)
class LoaderConfig:
    """How the clips are fetched; only `shuffle_shards` changes their order."""

    # 0: shuffled over everything, clip by clip. n: shards in a random order, shuffled within groups of n; those on a
    # server are copied to this machine before they are used, and the cache (WORLDLOOM_CACHE_GB) should hold two groups.
    shuffle_shards: int = within(0, 1_000_000, 0)
    on_corrupt: Literal["stop", "skip"] = "stop"  # skip: the next clip is taken, and it is counted (skipped_clips)


class Stream:
    """Batches of one rank; `workers` threads read ahead, none with 0."""

    def __init__(
        self,
        sources: str | Path | Sequence[Source],  # manifests
        batch: int,  # clips per rank and micro-step
        seed: int,
        place: tuple[int, int] = (0, 1),  # this rank, and how many there are
        workers: int = 1,
        loader: LoaderConfig = LoaderConfig(),
    ) -> None:
        self.batch, self.workers, self.loader = batch, workers, loader
        self.rank, self.world = place
        self.shards = Shards(sources, copies=loader.shuffle_shards > 0, faults=loader.on_corrupt == "skip")
        counts = [[info.clips for info in manifest.shards] for manifest in self.shards.manifests]
        self.order = Order(counts, [source.weight for source in self.shards.sources], seed, loader.shuffle_shards)
        for source, clips in zip(self.shards.sources, self.order.clips_per_set, strict=True):
            if not clips:
                raise UserError(f"weight={source.weight:g} of {source.path} gives no clip per epoch; use a larger one")

    def __len__(self) -> int:
        """Clips per epoch, over all ranks."""
        return self.order.clips_per_epoch

    def batch_at(self, micro_step: int, pin_memory: bool = False) -> Batch:
        """The batch of a micro-step, whatever was read before."""
        first, buffer = self._first_sample(micro_step), BatchBuffer(self.batch, pin_memory)
        clips, skipped = zip(*[self._read(first + row, buffer, row) for row in range(self.batch)], strict=True)
        entries = [self.shards.places[clip][1] for clip in clips]
        tensors = {name: tensor for name, tensor in buffer.tensors.items() if name != "start"}
        return Batch(ids=tuple(f"{entry.episode}:{entry.start}" for entry in entries), skipped=sum(skipped), **tensors)

    def _first_sample(self, micro_step: int) -> int:
        return (micro_step * self.world + self.rank) * self.batch

    def _read(self, sample: int, buffer: BatchBuffer, row: int) -> tuple[int, int]:
        """Reads a clip into a row of the buffer; gives its number, and how many clips before it had to be skipped.

        What cannot be read is tried once more. Only what is damaged or gone is skipped, not what a disk or a server
        refuses to give.
        """
        fault: Exception | None = None
        for skipped in range(len(self)):
            number = self.order.clip(sample + skipped)
            for last in (False, True):
                try:
                    self.shards.read_into(number, buffer, row)
                    return number, skipped
                except (ValueError, OSError) as error:
                    fault = error
                    if last and not (isinstance(error, FAULT) and self.loader.on_corrupt == "skip"):
                        raise
        raise UserError(f"no clip of {self.shards.sources[0].path} can be read, the last one because: {fault}")

    def batches(self, start: int = 0, pin_memory: bool = False) -> Generator[Batch, None, None]:
        """Batches from micro-step `start` on, without end; some are read before they are asked for.

        What goes wrong while reading is raised when that batch is asked for. Closing the iterator ends the threads.
        """
        calls = (partial(self.batch_at, step, pin_memory) for step in count(start))
        if not self.workers:
            yield from (call() for call in calls)
        batches = run_ahead(calls, self.workers, max(AHEAD, self.workers), "stream")
        copier, group = ThreadPoolExecutor(1, "copy"), None
        try:
            for step in count(start):
                if self.loader.shuffle_shards and group != (now := self.order.group(self._first_sample(step))):
                    group = now
                    for shard in self.order.shards_after(*group, self.batch, self.rank, self.world):
                        # An error stays in its future: it comes again when a clip of that shard is read.
                        copier.submit(self.shards.fetch, shard)
                yield next(batches)
        finally:
            batches.close()
            copier.shutdown(cancel_futures=True)
