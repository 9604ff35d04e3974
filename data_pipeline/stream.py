"""Manifest to batches: shuffled over the whole set, exactly resumable, each clip read by its offset.

The order is a function of (seed, epoch) over all clips. Sample g of the run, counted over all ranks and epochs, is clip
`order(g // clips)[g % clips]`; micro-step m of rank r takes sample `(m * world + r) * batch` and the `batch - 1` after
it. So a position is one number, ranks never share a clip within an epoch, every clip comes once per epoch, and the
order does not depend on the number of ranks or workers. An epoch's end falls where it falls: the batch that reaches it
goes on with the next epoch's first clips.
"""

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from data_pipeline import storage
from data_pipeline.shards import Entry, find_fault, load_manifest, read_index, shard_url, unpack_clip
from data_pipeline.types import ActionSpace, Batch, Clip, Manifest, ShardInfo

__all__ = ["Shards", "Stream", "load_manifest", "read_clips", "require_action_space", "summarise"]


class Shards:
    """All clips of a set by number, in the manifest's order."""

    def __init__(self, manifest_url: str | Path, verify: bool = True) -> None:
        self.manifest_url, self.verify = str(manifest_url), verify
        self.manifest: Manifest = load_manifest(manifest_url)
        self.places: list[tuple[ShardInfo, Entry]] = []
        for info in self.manifest.shards:
            self.places += [(info, entry) for entry in self._open(info)]
        self._verified: set[str] = set()
        self._verifying = threading.Lock()

    def __len__(self) -> int:
        return len(self.places)

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a clip: latents (c f h w), keyboard (n k), mouse (n 2), start ()."""
        info, entry = self.places[number]
        url = self._verified_url(info)
        return unpack_clip(storage.read_range(url, entry.offset, entry.size), url)

    def clip(self, number: int) -> Clip:
        """A whole clip, first frame and names too."""
        info, entry = self.places[number]
        tensors = self.read(number)
        jpeg = storage.read_range(shard_url(self.manifest_url, info), entry.jpeg_offset, entry.jpeg_size)
        given = (tensors["latents"], tensors["keyboard"], tensors["mouse"], jpeg, entry.episode, entry.start)
        return Clip(*given, tensors.get("visual"), tensors.get("image_latents"))

    def _open(self, info: ShardInfo) -> list[Entry]:
        """The index of a shard, its size and its number of clips compared with the manifest."""
        url = shard_url(self.manifest_url, info)
        if not storage.exists(url):
            raise FileNotFoundError(f"shard {url} is missing; run {self._verify_command}")
        found_bytes = storage.size(url)
        if found_bytes != info.bytes:
            raise ValueError(f"shard {url} has {found_bytes} bytes, not {info.bytes}; run {self._verify_command}")
        found, entries = read_index(url)
        if found != info or len(entries) != info.clips:
            raise ValueError(f"the index of shard {url} disagrees with the manifest; run {self._verify_command}")
        return entries

    def _verified_url(self, info: ShardInfo) -> str:
        """The shard's url, its SHA-256 compared when it is used for the first time."""
        url = shard_url(self.manifest_url, info)
        if self.verify:
            with self._verifying:
                fault = None if url in self._verified else find_fault(url, info)
                if fault:
                    raise ValueError(f"shard {url} is {fault}; run {self._verify_command}")
                self._verified.add(url)
        return url

    @property
    def _verify_command(self) -> str:
        return f"python -m data_pipeline verify {self.manifest_url}"


class Stream:
    """Batches of one rank; `workers` threads read ahead, none with 0."""

    def __init__(
        self,
        manifest_url: str | Path,
        batch: int,  # clips per rank and micro-step
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        *,
        verify: bool = True,
        shuffle: bool = True,
    ) -> None:
        if batch < 1 or workers < 0 or not 0 <= rank < world:
            raise ValueError(f"batch={batch}, workers={workers}, rank={rank} of {world}: batch must be 1 or more, "
                             "workers 0 or more, rank below the number of ranks")  # fmt: skip
        self.shards = Shards(manifest_url, verify)
        lanes = world * max(1, workers)
        shards = self.shards.manifest.shards
        if len(shards) < lanes:
            raise ValueError(
                f"{manifest_url}: {len(shards)} shards for {lanes} loader lanes (ranks x workers); "
                "write more shards or use fewer workers"
            )
        self.batch, self.rank, self.world, self.workers = batch, rank, world, workers
        clips = len(self.shards)
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(clips, seed, epoch) if shuffle else range(clips))

    def __len__(self) -> int:
        """Clips per epoch, over all ranks."""
        return len(self.shards)

    def samples(self, micro_step: int) -> list[int]:
        """The numbers of the clips that this rank takes in `micro_step`."""
        first = (micro_step * self.world + self.rank) * self.batch
        return [self.clip_number(g) for g in range(first, first + self.batch)]

    def clip_number(self, sample: int) -> int:
        """Which clip is sample `sample` of the run."""
        epoch, place = divmod(sample, len(self))
        return int(self._order(epoch)[place])

    def batch_at(self, micro_step: int) -> Batch:
        """The batch of a micro-step, whatever was read before."""
        numbers = self.samples(micro_step)
        clips = [self.shards.read(number) for number in numbers]
        entries = [self.shards.places[number][1] for number in numbers]
        return Batch(
            latents=rearrange([clip["latents"] for clip in clips], "b c f h w -> b c f h w"),
            keyboard=rearrange([clip["keyboard"] for clip in clips], "b n k -> b n k"),
            mouse=rearrange([clip["mouse"] for clip in clips], "b n m -> b n m"),
            ids=tuple(f"{entry.episode}:{entry.start}" for entry in entries),
            visual=torch.stack([clip["visual"] for clip in clips]) if "visual" in clips[0] else None,
            image_latents=(
                torch.stack([clip["image_latents"] for clip in clips]) if "image_latents" in clips[0] else None
            ),
        )

    def batches(self, start: int = 0, ahead: int = 4) -> Generator[Batch, None, None]:
        """Batches from micro-step `start` on, without end; up to `ahead` of them are read before they are asked for.

        What goes wrong while reading is raised when that batch is asked for. Closing the iterator ends the threads.
        """
        if not self.workers:
            yield from map(self.batch_at, count(start))
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="stream") as pool:
            steps = count(start)
            waiting: deque[Future[Batch]] = deque(pool.submit(self.batch_at, step) for step in islice(steps, ahead))
            try:
                for step in steps:
                    batch = waiting.popleft().result()
                    waiting.append(pool.submit(self.batch_at, step))
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def epoch_order(clips: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 ... clips - 1 in the shuffled order of an epoch."""
    # Sorting raw words of a bit generator: NumPy promises those for good, but not what Generator.permutation gives.
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(clips)
    return np.argsort(words, kind="stable")


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


def summarise(manifest_url: str | Path, looked_at: int = 256) -> list[str]:
    """Lines that say what a set holds; the shares of the keys are over `looked_at` clips spread over all of it."""
    shards = Shards(manifest_url, verify=False)
    manifest, space = shards.manifest, shards.manifest.game.action_space
    numbers = np.unique(np.linspace(0, len(shards) - 1, looked_at).astype(int))
    clips = [shards.read(int(number)) for number in numbers]
    keyboard = torch.cat([clip["keyboard"] for clip in clips])
    megabytes = sum(info.bytes for info in manifest.shards) / 1e6
    game = manifest.game
    split = f"{manifest.split}, {manifest.clips} clips"
    shares = ", ".join(f"{key} {share:.0%}" for key, share in zip(space.keys, keyboard.mean(0).tolist(), strict=True))
    lines = [
        f"{manifest_url}: {split} in {len(manifest.shards)} shards, {megabytes:.1f} MB",
        f"game {game.name!r}, {game.width}x{game.height} px, {game.fps:g} fps, action space {space.describe()}",
        f"{manifest.layout} clips of {manifest.clip_frames} frames = {manifest.clip_latents} latents, "
        f"codec {manifest.codec} {manifest.codec_hash}, plan {manifest.plan_hash}",
        f"keys held: {shares}, none {(keyboard.sum(1) == 0).float().mean().item():.0%}",
    ]
    if space.mouse:
        pitch, yaw = (torch.cat([clip["mouse"] for clip in clips]) * space.mouse_unit_deg).std(0).tolist()
        lines.append(f"mouse: standard deviation of pitch {pitch:.2f}, yaw {yaw:.2f} degrees per frame")
    return lines
