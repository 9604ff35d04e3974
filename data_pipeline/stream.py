"""Manifests to batches: shuffled over all of them, exactly resumable, each clip read by its offset.

The order is a function of (seed, epoch) over all clips (`data_pipeline/order.py`). Sample g of the run is counted over
all ranks and epochs; micro-step m of rank r takes sample `(m * world + r) * batch` and the `batch - 1` after it. So a
position is one number, ranks never share a clip within an epoch, every clip comes once per epoch, and the order does
not depend on the number of ranks or workers. An epoch's end falls where it falls: the batch that reaches it goes on
with the next epoch's first clips.
"""

import math
import mmap
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import numpy as np
import torch

from data_pipeline import storage
from data_pipeline.order import Order
from data_pipeline.shards import (
    ALIGNMENT,
    Entry,
    Layout,
    clip_layout,
    find_fault,
    load_manifest,
    read_clip_into,
    read_index,
    shard_url,
    unpack_clip,
)
from data_pipeline.types import ActionSpace, Batch, Clip, Manifest, ShardInfo, Source

__all__ = ["LoaderConfig", "Shards", "Stream", "load_manifest", "read_clips", "require_action_space"]


class Shards:
    """All clips of one set or several by number, in the order of the manifests."""

    def __init__(self, sources: str | Path | Sequence[Source], verify: bool = True, copies: bool = False) -> None:
        """With `copies`, shards on a server are read from copies on this machine, made when a clip of them is wanted.

        Raises in one line for a set that is not there, is not whole, or is of another kind than the first.
        """
        given = [Source(str(sources))] if isinstance(sources, str | Path) else list(sources)
        self.sources, self.verify, self.copies = given, verify, copies
        self.manifests = load_manifests(given)
        self.shards = [
            (source.path, info)
            for source, manifest in zip(given, self.manifests, strict=True)
            for info in manifest.shards
        ]
        self.places: list[tuple[int, Entry]] = []  # which shard, and where in it
        for number, (path, info) in enumerate(self.shards):
            self.places += [(number, entry) for entry in _open_shard(path, info)]
        self._verified: set[int] = set()
        self._verifying = threading.Lock()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def manifest(self) -> Manifest:
        """That of the first set: what all have in common can be asked of it."""
        return self.manifests[0]

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a clip: latents (c f h w), keyboard (n k), mouse (n 2), start ()."""
        shard, entry = self.places[number]
        with self._opened(shard) as url:
            return unpack_clip(storage.read_range(url, entry.offset, entry.size), url)

    def layout(self, number: int) -> Layout:
        """Dtype and shape of a clip's tensors by name."""
        shard, entry = self.places[number]
        with self._opened(shard) as url:
            return clip_layout(url, entry)

    def read_into(self, number: int, layout: Layout, rows: Mapping[str, memoryview]) -> None:
        """As `read`, into bytes that are there; the clip must have that layout."""
        shard, entry = self.places[number]
        with self._opened(shard) as url:
            read_clip_into(url, entry, layout, rows)

    def clip(self, number: int) -> Clip:
        """A whole clip, first frame and names too."""
        shard, entry = self.places[number]
        tensors = self.read(number)
        with self._opened(shard) as url:
            jpeg = storage.read_range(url, entry.jpeg_offset, entry.jpeg_size)
        given = (tensors["latents"], tensors["keyboard"], tensors["mouse"], jpeg, entry.episode, entry.start)
        return Clip(*given, tensors.get("visual"), tensors.get("image_latents"))

    def fetch(self, shard: int) -> None:
        """Makes the copy of a shard, so that nobody waits for it later."""
        with self._opened(shard):
            pass

    @contextmanager
    def _opened(self, shard: int) -> Iterator[str]:
        """Where the shard can be read within the block; its SHA-256 is compared when it is used for the first time."""
        path, info = self.shards[shard]
        url = shard_url(path, info)
        if self.copies and storage.is_s3(url):
            with storage.copy_of(url, info.bytes, info.sha256) as copy:  # compares it too
                yield str(copy)
            return
        if self.verify:
            with self._verifying:
                fault = None if shard in self._verified else find_fault(url, info)
                if fault:
                    raise ValueError(f"shard {url} is {fault}; run {_verify_command(path)}")
                self._verified.add(shard)
        yield url


def _open_shard(manifest_url: str, info: ShardInfo) -> list[Entry]:
    """The index of a shard, its size and its number of clips compared with the manifest."""
    url, verify = shard_url(manifest_url, info), _verify_command(manifest_url)
    if not storage.exists(url):
        raise FileNotFoundError(f"shard {url} is missing; run {verify}")
    found_bytes = storage.size(url)
    if found_bytes != info.bytes:
        raise ValueError(f"shard {url} has {found_bytes} bytes, not {info.bytes}; run {verify}")
    found, entries = read_index(url)
    if found != info or len(entries) != info.clips:
        raise ValueError(f"the index of shard {url} disagrees with the manifest; run {verify}")
    return entries


def _verify_command(manifest_url: str) -> str:
    return f"python -m data_pipeline verify {manifest_url}"


OF_ALL = ("layout", "clip_frames", "clip_latents", "codec_hash", "vision", "unknown")


def load_manifests(sources: Sequence[Source]) -> list[Manifest]:
    """Their manifests. Raises in one line for one that is not there, or is of another kind than the first."""
    manifests = [load_manifest(source.path) for source in sources]
    for source, manifest in zip(sources[1:], manifests[1:], strict=True):
        require_same_kind(manifests[0], sources[0].path, manifest, source.path)
    return manifests


def require_same_kind(
    manifest: Manifest, url: str, other: Manifest, other_url: str, of_set: Sequence[str] = OF_ALL
) -> None:
    """Raises ValueError, naming what differs, unless clips of both sets mean the same and have the same size."""
    require_action_space(other, manifest.game.action_space, f"those of {url}")
    of_game = ("fps", "height", "width")
    facts = [(name, getattr(manifest, name), getattr(other, name)) for name in of_set]
    facts += [(name, getattr(manifest.game, name), getattr(other.game, name)) for name in of_game]
    for name, ours, theirs in facts:
        if ours != theirs:
            raise ValueError(f"{other_url} has {name} {theirs}, {url} {ours}; they must agree in it; encode both alike")


AHEAD = 4  # batches
LARGE_PAGE = 1 << 21  # bytes


class Memory:
    """Memory of batches that nobody looks at any more, for the next ones: to ask the system for it anew, page by page,
    takes as long as the reading."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, b: int, size: int) -> np.ndarray:
        """(b size) bytes, not yet filled; they come back when no tensor, and no view of one, lies in them any more."""
        free = self._free[b * size]
        memory = free.pop() if free else allocate(b * size)
        seen = memory.reshape(b, size)
        weakref.finalize(seen, free.append, memory)
        return seen


class Filling:
    """A batch that is being filled, row by row, with clips of one layout."""

    def __init__(self, layout: Layout, b: int, memory: Memory) -> None:
        self.layout = layout
        self.bytes = {
            name: memory.take(b, math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in layout.items()
        }

    def row(self, i: int) -> dict[str, memoryview]:
        """The bytes of row `i` by tensor."""
        return {name: rows[i].data for name, rows in self.bytes.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """(b ...) by name."""
        return {
            name: torch.from_numpy(self.bytes[name]).view(dtype).view(-1, *shape)
            for name, (dtype, shape) in self.layout.items()
        }


def allocate(size: int) -> np.ndarray:
    """(size) bytes from a multiple of 64 on, in large pages where the system has them: both make filling faster."""
    boundary = LARGE_PAGE if size >= LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE") else ALIGNMENT
    if boundary == LARGE_PAGE:
        area = mmap.mmap(-1, size + boundary, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(area, np.uint8)
    else:
        memory = np.empty(size + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    return memory[start : start + size]


@dataclass(frozen=True)
class LoaderConfig:
    """How the clips are fetched; only `shuffle_shards` changes their order."""

    # 0: shuffled over everything, clip by clip. n: shards in a random order, shuffled within groups of n; those on a
    # server are copied to this machine before they are used, and the cache (WORLDLOOM_CACHE_GB) should hold two groups.
    shuffle_shards: int = 0
    on_corrupt: Literal["stop", "skip"] = "stop"  # skip: the next clip stands in, and is counted (skipped_clips)

    def __post_init__(self) -> None:
        if self.shuffle_shards < 0:
            raise ValueError(f"loader.shuffle_shards={self.shuffle_shards} must be 0 (all at once) or more")


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
        if batch < 1 or workers < 0 or not 0 <= rank < world:
            raise ValueError(f"batch={batch}, workers={workers}, rank={rank} of {world}: batch must be 1 or more, "
                             "workers 0 or more, rank below the number of ranks")  # fmt: skip
        self.shards = Shards(sources, verify, copies=loader.shuffle_shards > 0)
        lanes = world * max(1, workers)
        if len(self.shards.shards) < lanes:
            raise ValueError(
                f"{self.shards.sources[0].path}: {len(self.shards.shards)} shards for {lanes} loader lanes (ranks x "
                "workers); write more shards (encode with a smaller shard_clips), or use fewer workers or ranks"
            )
        self.batch, self.rank, self.world, self.workers, self.loader = batch, rank, world, workers, loader
        self._memory = Memory()
        counts = [[info.clips for info in manifest.shards] for manifest in self.shards.manifests]
        weights = [source.weight for source in self.shards.sources]
        self.order = Order(counts, weights, seed, loader.shuffle_shards, shuffle)
        if not self.order.clips_per_epoch:
            raise ValueError(f"weights {weights}: an epoch of them holds no clip at all; use larger ones")

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

        What cannot be read is tried once more, since a disk or a copy may be at fault for a moment.
        """
        for skipped in range(len(self)):
            number = self.order.clip(sample + skipped)
            for last in (False, True):
                try:
                    filling = filling or Filling(self.shards.layout(number), self.batch, self._memory)
                    self.shards.read_into(number, filling.layout, filling.row(row))
                    return number, skipped, filling
                except (ValueError, OSError):
                    if last and self.loader.on_corrupt == "stop":
                        raise
        raise ValueError(f"no clip of {self.shards.sources[0].path} can be read; run python -m data_pipeline verify")

    def batches(self, start: int = 0, ahead: int = AHEAD) -> Generator[Batch, None, None]:
        """Batches from micro-step `start` on, without end; up to `ahead` of them are read before they are asked for.

        What goes wrong while reading is raised when that batch is asked for. Closing the iterator ends the threads.
        """
        if not self.workers:
            yield from map(self.batch_at, count(start))
            return
        lanes = range(start, start + self.workers)
        readers = [Reader(self.batch_at, count(lane, self.workers), -(-ahead // self.workers)) for lane in lanes]
        with Fetching(self) as fetching:
            try:
                for step in count(start):
                    fetching.at(self.first_sample(step))
                    yield readers[(step - start) % self.workers].next()
            finally:
                for reader in readers:
                    reader.close()


class Reader:
    """A thread that makes every so many a batch, up to `ahead` of them before they are asked for.

    A queue and a count of free places cost less per batch than a pool of threads and its futures do.
    """

    def __init__(self, make: Callable[[int], Batch], steps: Iterator[int], ahead: int) -> None:
        self._room, self._made, self._closed = threading.Semaphore(ahead), SimpleQueue[Batch | Exception](), False
        self._thread = threading.Thread(target=self._run, args=(make, steps), name="stream", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Batch], steps: Iterator[int]) -> None:
        for step in steps:
            self._room.acquire()
            if self._closed:
                return
            try:
                self._made.put(make(step))  # held by nobody else: its memory is free when the reader of it is done
            except Exception as error:  # noqa: BLE001 - raised where the batch is asked for
                self._made.put(error)
                return

    def next(self) -> Batch:
        """The next one; raises what went wrong in making it."""
        made = self._made.get()
        if isinstance(made, Exception):
            raise made
        self._room.release()
        return made

    def close(self) -> None:
        """Ends the thread; waits for what it is at."""
        self._closed = True
        self._room.release()
        self._thread.join()


class Fetching:
    """Copies the shards of the group after the one in use to this machine, one after the other."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._pool, self._closed = ThreadPoolExecutor(1, thread_name_prefix="fetching"), False
        self._group: tuple[int, int] | None = None
        self._done: Future[None] | None = None

    def __enter__(self) -> "Fetching":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._pool.shutdown()

    def at(self, sample: int) -> None:
        """Says that reading has come to `sample`."""
        if not self.stream.loader.shuffle_shards or (self._done and not self._done.done()):
            return
        group = self.stream.order.group(sample)
        if group != self._group:
            self._group = group
            self._done = self._pool.submit(self._fetch_after, *group)

    def _fetch_after(self, epoch: int, group: int) -> None:
        order = self.stream.order
        for shard in order.shards_of(epoch, group + 1) or order.shards_of(epoch + 1, 0):
            if self._closed:
                return
            try:
                self.stream.shards.fetch(shard)
            except (ValueError, OSError):
                continue  # whoever needs a clip of it will say so


def read_clips(manifest_url: str | Path, limit: int | None = None) -> list[Clip]:
    """The first `limit` clips of a set (all if None) in the manifest's order, first frames included."""
    shards = Shards(manifest_url)
    return [shards.clip(number) for number in range(len(shards) if limit is None else min(limit, len(shards)))]


def require_action_space(manifest: Manifest, space: ActionSpace, whose: str) -> None:
    """Raises ValueError, naming both, unless the clips' action vectors mean what `whose` take them to mean."""
    own = manifest.game.action_space
    if own.hash != space.hash:
        raise ValueError(
            f"the clips have the action space {own.describe()}, {whose} {space.describe()}; they must match"
        )
