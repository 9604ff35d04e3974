"""Manifests to batches: shuffled over all of them, exactly resumable, each clip read by its offset.

The order is a function of (seed, epoch) over all clips (`data_pipeline/order.py`). Sample g of the run is counted over
all ranks and epochs; micro-step m of rank r takes sample `(m * world + r) * batch` and the `batch - 1` after it. So a
position is one number, ranks never share a clip within an epoch, every clip comes once per epoch, and the order does
not depend on the number of ranks or workers. An epoch's end falls where it falls: the batch that reaches it goes on
with the next epoch's first clips.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from data_pipeline.batch_memory import Filling, Memory
from data_pipeline.order import Order
from data_pipeline.prefetch import Fetching, Reader
from data_pipeline.shard_set import Shards
from data_pipeline.shards import Layout
from data_pipeline.types import Batch, Source

AHEAD = 4  # batches
MOST_WORKERS, MOST_CLIPS = 1024, 1 << 20  # threads of a rank, clips of its batch; more is a slip of the hand


@dataclass(frozen=True)
class LoaderConfig:
    """How the clips are fetched; only `shuffle_shards` changes their order."""

    # 0: shuffled over everything, clip by clip. n: shards in a random order, shuffled within groups of n; those on a
    # server are copied to this machine before they are used, and the cache (WORLDLOOM_CACHE_GB) should hold two groups.
    shuffle_shards: int = 0
    on_corrupt: Literal["stop", "skip"] = "stop"  # skip: the next clip stands in, and is counted (skipped_clips)

    def __post_init__(self) -> None:
        if self.shuffle_shards < 0:
            raise UserError(f"loader.shuffle_shards={self.shuffle_shards} must be 0 (all at once) or more")


def require_lanes(shards: int, world: int, workers: int, whose: str) -> None:
    """Raises ValueError in one line if there are fewer shards than loader lanes."""
    lanes = world * max(1, workers)
    if shards < lanes:
        raise UserError(
            f"{whose}: {shards} shards for {lanes} loader lanes (ranks x workers); write more shards (encode with a "
            "smaller shard_clips), or use fewer workers or ranks"
        )


class Stream:
    """Batches of one rank; `workers` threads read ahead, none with 0."""

    def __init__(
        self,
        sources: str | Path | Sequence[Source],  # manifests
        batch: int,  # clips per rank and micro-step
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        *,
        loader: LoaderConfig = LoaderConfig(),
        verify: bool = True,
        shuffle: bool = True,
    ) -> None:
        if not 1 <= batch <= MOST_CLIPS or not 0 <= workers <= MOST_WORKERS or not 0 <= rank < world:
            raise UserError(f"batch={batch}, workers={workers}, rank={rank} of {world}: batch must be 1 to "
                             f"{MOST_CLIPS}, workers 0 to {MOST_WORKERS}, rank below the number of ranks")  # fmt: skip
        self.shards = Shards(sources, verify, copies=loader.shuffle_shards > 0, faults=loader.on_corrupt == "skip")
        require_lanes(len(self.shards.shards), world, workers, self.shards.sources[0].path)
        self.batch, self.rank, self.world, self.workers, self.loader = batch, rank, world, workers, loader
        self._memory = Memory()
        self._layout: Layout | None = None  # of all clips
        counts = [[info.clips for info in manifest.shards] for manifest in self.shards.manifests]
        weights = [source.weight for source in self.shards.sources]
        self.order = Order(counts, weights, seed, loader.shuffle_shards, shuffle)
        for source, due in zip(self.shards.sources, self.order.dues, strict=True):
            if not due:
                raise UserError(
                    f"weight {source.weight:g} of {source.path}: no clip of it would ever come; use a larger one"
                )

    def __len__(self) -> int:
        """Clips per epoch, over all ranks."""
        return self.order.clips_per_epoch

    def first_sample(self, micro_step: int) -> int:
        """The first sample that this rank takes in `micro_step`."""
        return (micro_step * self.world + self.rank) * self.batch

    def batch_at(self, micro_step: int) -> Batch:
        """The batch of a micro-step, whatever was read before."""
        first = self.first_sample(micro_step)
        filling: Filling | None = None
        numbers, skipped = [], 0
        for i in range(self.batch):
            number, missed, filling = self._read(first + i, i, filling)
            numbers.append(number)
            skipped += missed
        stacked = filling.tensors() if filling else {}
        entries = [self.shards.places[number][1] for number in numbers]
        return Batch(
            latents=stacked["latents"],
            keyboard=stacked["keyboard"],
            mouse=stacked["mouse"],
            ids=tuple(f"{entry.episode}:{entry.start}" for entry in entries),
            visual=stacked.get("visual"),
            image_latents=stacked.get("image_latents"),
            skipped=skipped,
        )

    def _read(self, sample: int, row: int, filling: Filling | None) -> tuple[int, int, Filling]:
        """Reads a clip into a row of the batch, which the first one makes; gives its number, how many clips before it
        had to be skipped, and the batch.

        What cannot be read is tried once more. Only what is damaged or gone is skipped, not what a disk or a server
        refuses to give.
        """
        fault: Exception | None = None
        for skipped in range(len(self)):
            number = self.order.clip(sample + skipped)
            for last in (False, True):
                try:
                    self._layout = self._layout or self.shards.layout(number)
                    filling = filling or Filling(self._layout, self.batch, self._memory)
                    self.shards.read_into(number, filling.layout, filling.row(row))
                    return number, skipped, filling
                except (ValueError, OSError) as error:
                    fault = error
                    damaged = isinstance(error, ValueError | FileNotFoundError)
                    if last and not (damaged and self.loader.on_corrupt == "skip"):
                        raise
        raise UserError(f"no clip of {self.shards.sources[0].path} can be read, the last one because: {fault}")

    def batches(self, start: int = 0, ahead: int = AHEAD) -> Generator[Batch, None, None]:
        """Batches from micro-step `start` on, without end; up to `ahead` of them are read before they are asked for.

        What goes wrong while reading is raised when that batch is asked for. Closing the iterator ends the threads.
        """
        if not self.workers:
            yield from map(self.batch_at, count(start))
            return
        lanes = range(start, start + self.workers)
        readers = [Reader(self.batch_at, count(lane, self.workers), -(-ahead // self.workers)) for lane in lanes]
        fetching = Fetching(self.order, self.shards, self.batch, self.rank, self.world)
        try:
            for step in count(start):
                fetching.at(self.first_sample(step))
                yield readers[(step - start) % self.workers].next()
        finally:
            for thread in (*readers, fetching):
                thread.stop()
            for thread in (*readers, fetching):
                thread.join()
