"""Recordings to shards of latents, by any number of workers: each makes its share, then whatever is missing.

Two workers that make the same shard write the same bytes, so they need not know of each other.
"""

import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from tqdm import tqdm

from configs import storage
from configs.errors import UserError
from configs.files import remove_unfinished, require_other_files
from data_pipeline.clips import BadEpisodeError, Encoder, Run, cut_episodes, encode_clips
from data_pipeline.plan import EncodeConfig, LeftOut, Plan, count_clips, describe_fault, make_plans, unless_there
from data_pipeline.prefetch import PrefetchThread
from data_pipeline.shards import MANIFEST, Index, index_url, read_index, save_manifest, write_shard
from data_pipeline.types import Clip, Episode, ShardInfo
from data_pipeline.verify import FAULT, require_clips
from model.codec import load_codec
from model.vision import load_vision

T = TypeVar("T")
SHARD, LEFT_OUT = "shard-{:06d}.tar", "left_out.json"
AHEAD = 2  # batches of runs that are decoded before the codec asks for them


class Encoded(NamedTuple):
    """What a run of this worker did."""

    clips: int  # of the whole set
    new_clips: int  # made by this worker
    shards: int
    manifests: tuple[str, ...]
    seconds: float
    bytes: int  # written by this worker
    left_out: tuple[LeftOut, ...]  # of each set


@dataclass(frozen=True)
class ShardJob:
    """A shard of a plan, to be made unless it is there."""

    config: EncodeConfig
    url: str
    episodes: tuple[Episode, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)  # episodes that could not be decoded, and why

    @property
    def clips(self) -> int:
        return count_clips(self.config, self.episodes)

    def without(self, bad: BadEpisodeError) -> "ShardJob":
        """The same shard as if the episode had not been planned."""
        rest = tuple(episode for episode in self.episodes if episode.id != bad.episode)
        return replace(self, episodes=rest, left_out={**self.left_out, bad.episode: describe_fault(self.config, bad)})

    def read_index(self) -> Index | None:
        """The shard's index if both are there, the shard in full length; its bytes are not compared.

        A shard that leaves episodes out does not count for a worker that is to stop at them.
        """
        try:
            index = read_index(self.url)
            whole = not index.info.clips or storage.path(self.url).stat().st_size == index.info.bytes
        except FileNotFoundError:
            return None
        return None if not whole or (index.left_out and self.config.on_bad_recording == "stop") else index

    def find_fault(self) -> str | None:
        """Why the shard is to be made again, in a few words, or None. Reads all of it."""
        try:
            info, entries, left_out = read_index(self.url)
            if left_out:  # the recording may have been mended
                return f"made without {', '.join(left_out)}, tried again"
            if info.url != storage.name_of(self.url) or len(entries) != self.clips:
                return "its index is of another shard"
            require_clips(self.url, info, entries, shapes={})
        except FAULT as error:
            return str(error)
        return None


def list_jobs(plan: Plan) -> list[ShardJob]:
    urls = (storage.join(plan.folder, SHARD.format(i)) for i in range(len(plan.shards)))
    return [ShardJob(plan.config, url, episodes) for url, episodes in zip(urls, plan.shards, strict=True)]


def sort_jobs(jobs: Sequence[T]) -> list[T]:
    """This worker's share, then the others' in random order, so that two workers that help out seldom choose the same
    job. A worker that no launcher has numbered has all jobs for its share."""
    rank, world = from_launcher("RANK", 0), from_launcher("WORLD_SIZE", 1)
    others = [job for i, job in enumerate(jobs) if i % world != rank]
    return [*jobs[rank::world], *random.sample(others, len(others))]


def from_launcher(name: str, alone: int) -> int:
    """The variable that a launcher such as `accelerate launch` sets for this process, or `alone`."""
    return int(os.environ.get(name, alone))


def encode(config: EncodeConfig) -> Encoded:
    """Makes the shards that are not there yet, beside any number of other workers, then each set's manifest.

    Killed at any moment and started again, with as many workers or others, it ends with the same bytes. An episode that
    cannot be read, and a folder that holds the shards of another plan, raise UserError before anything is written. With
    `on_bad_recording: skip`, such an episode, and one that cannot be decoded, is left out; the shard's index says so.
    """
    outs = [config.out, *(storage.join(config.out, split) for split in ("train", "heldout"))]
    require_other_files(outs, {"source": config.source, "vision_weights": config.vision_weights})
    encoder = load_encoder(config)
    plans = make_plans(config, encoder.codec)
    for plan in plans:
        plan.require_same()
    for plan in plans:
        plan.require_same(write=True)
    began, worker = time.perf_counter(), Worker(encoder)
    indexes = iter(worker.make_all([job for plan in plans for job in list_jobs(plan)]))
    by_plan = [(plan, list(islice(indexes, len(plan.shards)))) for plan in plans]
    left_out = tuple(_list_left_out(*of_plan) for of_plan in by_plan)
    infos = [[index.info for index in of_plan if index.info.clips] for _, of_plan in by_plan]
    manifests = tuple(map(partial(_write_manifest, encoder), plans, infos, left_out))
    for plan in plans:
        remove_unfinished(plan.folder)  # of killed workers; a live one finds its shard there
    clips = [info.clips for of_plan in infos for info in of_plan]
    taken_s = time.perf_counter() - began
    return Encoded(sum(clips), worker.clips, len(clips), manifests, taken_s, worker.bytes, left_out)


def load_encoder(config: EncodeConfig) -> Encoder:
    """Codec and vision tower on this worker's device."""
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    index = from_launcher("LOCAL_RANK", 0)
    device = torch.device("cuda", index % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    tower = load_vision(config.vision_weights).to(device) if config.vision_weights else None
    return Encoder(load_codec(config.codec).to(device), tower, config, device)


def _list_left_out(plan: Plan, indexes: Sequence[Index]) -> LeftOut:
    bad = {name: why for index in indexes for name, why in index.left_out.items()}
    if not any(index.info.clips for index in indexes):
        name, why = next(iter(bad.items()))
        raise UserError(f"no {plan.split} episode can be decoded; {name}: {why}")
    return plan.left_out(bad)


def _write_manifest(encoder: Encoder, plan: Plan, infos: Sequence[ShardInfo], left_out: LeftOut) -> str:
    url = storage.join(plan.folder, MANIFEST)
    with unless_there(url):
        storage.write_text(storage.join(plan.folder, LEFT_OUT), json.dumps(asdict(left_out), indent=1) + "\n")
        save_manifest(plan.manifest(encoder.codec, infos), url)
    return url


def drop_faulty(config: EncodeConfig) -> list[str]:
    """Removes the indexes of shards that are altered, damaged or made without an episode that could not be decoded, so
    that `encode` makes these shards again; a line for each. Of several workers, each reads its share."""
    dropped = []
    for plan in make_plans(config, load_encoder(config).codec):
        plan.require_same()
        for job in list_jobs(plan)[from_launcher("RANK", 0) :: from_launcher("WORLD_SIZE", 1)]:
            if fault := job.find_fault():
                storage.remove(index_url(job.url))
                dropped.append(f"{job.url}: {fault}")
    return dropped


class Worker:
    """Makes shards. While the codec works, the next frames are decoded and the last shard is written."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.config = encoder, encoder.config
        self.clips, self.bytes = 0, 0  # made by this worker
        self._overtaken = False  # another worker was first with a shard of this one

    def make_all(self, jobs: Sequence[ShardJob]) -> list[Index]:
        """The shards' indexes, when all are there at once: another worker's `repair` may remove some meanwhile."""
        while True:
            self.make_missing(sort_jobs(jobs))
            indexes = [job.read_index() for job in jobs]
            if all(indexes):
                return [index for index in indexes if index]

    def make_missing(self, jobs: Sequence[ShardJob]) -> None:
        """Makes those of the shards that are not there when it comes to them."""
        quiet = from_launcher("LOCAL_RANK", 0) > 0 or None  # None: shown on a terminal
        total, writing = sum(job.clips for job in jobs), Future[None]()
        writing.set_result(None)
        with (
            tqdm(total=total, desc="encode", unit="clip", smoothing=0.1, disable=quiet) as bar,
            ThreadPoolExecutor(1, "write") as pool,
        ):
            started = ((job, self._decode(job)) for job in self._missing(jobs, bar))
            coming = next(started, None)
            while coming:
                (planned, runs), coming = coming, next(started, None)  # whose first frames are decoded meanwhile
                job, clips = self._encode(planned, runs, bar)
                bar.update(planned.clips - len(clips))
                writing.result()
                writing = pool.submit(self._write, job, clips)
                self.clips += len(clips)
            writing.result()

    def _missing(self, jobs: Sequence[ShardJob], bar: tqdm) -> Iterator[ShardJob]:
        remaining = list(jobs)
        while remaining:
            # Two workers without a number are at the same shards, until both go on in random order.
            job = remaining.pop(random.randrange(len(remaining)) if self._overtaken else 0)
            if job.read_index():
                bar.update(job.clips)
            else:
                yield job

    def _decode(self, job: ShardJob) -> PrefetchThread[Run]:
        return PrefetchThread(cut_episodes(job.episodes, self.config), AHEAD * self.config.batch, "decode")

    def _encode(self, job: ShardJob, runs: PrefetchThread[Run], bar: tqdm) -> tuple[ShardJob, list[Clip]]:
        """The job and its clips, or if bad episodes are to be skipped, the job and the clips without them."""
        while True:
            clips = list[Clip]()
            try:
                with closing(runs):
                    for clip in encode_clips(self.encoder, job.episodes, runs):
                        clips.append(clip)
                        bar.update()
                return job, clips
            except BadEpisodeError as bad:
                if self.config.on_bad_recording == "stop":
                    raise
                job = job.without(bad)
            bar.update(-len(clips))
            runs = self._decode(job)

    def _write(self, job: ShardJob, clips: list[Clip]) -> None:
        if job.read_index():
            self._overtaken = True
            return
        with unless_there(index_url(job.url)):
            self.bytes += write_shard(job.url, clips, job.left_out).bytes
