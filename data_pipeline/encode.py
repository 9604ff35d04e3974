"""Recordings to shards of latents, by any number of workers: each makes its share, then whatever is missing.

Two workers that make the same shard write the same bytes, so they need not know of each other.
"""

import json
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from tqdm import tqdm

from configs import storage
from configs.errors import UserError
from configs.files import remove_unfinished, require_other_files
from data_pipeline.clips import BadEpisodeError, Encoder, Run, cut_episodes, encode_clips
from data_pipeline.left_out import LEFT_OUT, LeftOut
from data_pipeline.plan import PLAN, EncodeConfig, Plan, add_bad_episodes, describe_set, make_plans, require_same_plan
from data_pipeline.prefetch import PrefetchThread
from data_pipeline.shard_jobs import ShardJob, from_launcher, list_jobs, sort_jobs
from data_pipeline.shards import MANIFEST, Index, index_url, save_manifest, write_shard
from data_pipeline.types import Clip
from model.codec import load_codec
from model.vision import load_vision

AHEAD = 2  # batches of runs that are decoded before the codec asks for them


class Encoded(NamedTuple):
    """What a run of this worker did."""

    clips: int  # of the whole set
    new_clips: int  # made by this worker
    shards: int
    manifests: tuple[str, ...]
    seconds: float
    bytes: int  # written by this worker
    waits: str  # for which shares of the time the codec waited
    left_out: tuple[LeftOut, ...]  # of each set


def encode_recordings(config: EncodeConfig) -> Encoded:
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
        require_same_plan(plan)
    for plan in plans:
        _settle_plan(plan)
    worker = Worker(encoder)
    indexes = worker.make_all([job for plan in plans for job in list_jobs(config, plan)])
    remaining = iter(indexes)
    by_plan = [(plan, list(islice(remaining, len(plan.shards)))) for plan in plans]
    left_out = tuple(_collect_left_out(config, *of_plan) for of_plan in by_plan)
    manifests = tuple(_write_manifest(encoder, *of_plan, left) for of_plan, left in zip(by_plan, left_out, strict=True))
    for plan in plans:
        remove_unfinished(plan.folder)  # of killed workers; a live one finds its shard there
    clips = [index.info.clips for index in indexes if index.info.clips]
    seconds = time.perf_counter() - worker.began
    return Encoded(
        sum(clips), worker.clips, len(clips), manifests, seconds, worker.bytes, worker.describe_waits(), left_out
    )


def _collect_left_out(config: EncodeConfig, plan: Plan, indexes: Sequence[Index]) -> LeftOut:
    bad = {name: why for index in indexes for name, why in index.left_out.items()}
    if not any(index.info.clips for index in indexes):
        name, why = next(iter(bad.items()))
        raise UserError(f"no {plan.split} episode can be decoded; {name}: {why}")
    return add_bad_episodes(config, plan, bad)


def _write_manifest(encoder: Encoder, plan: Plan, indexes: Sequence[Index], left_out: LeftOut) -> str:
    manifest = storage.join(plan.folder, MANIFEST)
    infos = [index.info for index in indexes if index.info.clips]
    with _unless_there(partial(storage.exists, manifest)):
        left_out.save(storage.join(plan.folder, LEFT_OUT))
        save_manifest(describe_set(encoder.config, encoder.codec, plan, infos), manifest)
    return manifest


def load_encoder(config: EncodeConfig) -> Encoder:
    """Codec and vision tower on this worker's device."""
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    index = from_launcher("LOCAL_RANK", 0)
    device = torch.device("cuda", index % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    tower = load_vision(config.vision_weights) if config.vision_weights else None
    codec = load_codec(config.codec).to(device)
    return Encoder(codec, tower.to(device) if tower else None, config, device)


def drop_faulty(config: EncodeConfig) -> list[str]:
    """Removes the indexes of shards that are altered, damaged or made without an episode that could not be decoded, so
    that `encode_recordings` makes these shards again; a line for each. Of several workers, each reads its share."""
    encoder = load_encoder(config)
    dropped = []
    for plan in make_plans(config, encoder.codec):
        require_same_plan(plan)
        for job in list_jobs(config, plan)[from_launcher("RANK", 0) :: from_launcher("WORLD_SIZE", 1)]:
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
        self.began, self.waited_s = time.perf_counter(), {"frames": 0.0, "writing": 0.0}

    def describe_waits(self) -> str:
        """For which shares of the time the codec waited."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        return ", ".join(f"{what} {seconds / elapsed:.0%}" for what, seconds in self.waited_s.items())

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
        total = sum(job.clips for job in jobs)
        writing: Future[None] | None = None
        with (
            tqdm(total=total, desc="encode", unit="clip", smoothing=0.1, disable=quiet) as bar,
            ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
            closing(self._start(jobs, bar)) as started,
        ):
            for planned, batches in started:
                job, clips = self._encode(planned, batches, bar)
                bar.update(planned.clips - len(clips))
                self._finish(writing)
                writing = pool.submit(self._write, job, clips)
                self.clips += len(clips)
                written = self.bytes / 1e6 / (time.perf_counter() - self.began)
                bar.set_postfix_str(f"{written:.1f} MB/s, waits for {self.describe_waits()}")
            self._finish(writing)

    def _start(
        self, jobs: Sequence[ShardJob], bar: tqdm
    ) -> Generator[tuple[ShardJob, PrefetchThread[list[Run]]], None, None]:
        """The missing shards' jobs with their frames; the next job's first ones are decoded while one job is done."""
        started, remaining = deque[tuple[ShardJob, PrefetchThread[list[Run]]]](), list(jobs)
        try:
            while remaining:
                # Two workers without a number are at the same shards, until both go on in random order.
                job = remaining.pop(random.randrange(len(remaining)) if self._overtaken else 0)
                if job.read_index():
                    bar.update(job.clips)
                    continue
                started.append((job, self._decode(job)))
                if len(started) > 1:
                    yield started.popleft()
            while started:
                yield started.popleft()
        finally:
            for _, batches in started:
                batches.close()

    def _decode(self, job: ShardJob) -> PrefetchThread[list[Run]]:
        return PrefetchThread(cut_episodes(job.episodes, self.config), AHEAD, "decode")

    def _encode(self, job: ShardJob, batches: PrefetchThread[list[Run]], bar: tqdm) -> tuple[ShardJob, list[Clip]]:
        """The job and its clips, or if bad episodes are to be skipped, the job and the clips without them."""
        while True:
            clips = list[Clip]()
            with closing(batches):
                try:
                    for clip in encode_clips(self.encoder, job.episodes, batches):
                        clips.append(clip)
                        bar.update()
                    return job, clips
                except BadEpisodeError as bad:
                    if self.config.on_bad_recording == "stop":
                        raise
                    job = job.without(bad)
                finally:
                    self.waited_s["frames"] += batches.waited_s
            bar.update(-len(clips))
            batches = self._decode(job)

    def _finish(self, writing: Future[None] | None) -> None:
        began = time.perf_counter()
        if writing is not None:
            writing.result()
        self.waited_s["writing"] += time.perf_counter() - began

    def _write(self, job: ShardJob, clips: list[Clip]) -> None:
        if job.read_index():
            self._overtaken = True
            return
        with _unless_there(job.read_index):
            self.bytes += write_shard(job.url, clips, job.left_out).bytes


def _settle_plan(plan: Plan) -> None:
    """Writes the plan, or finds that another worker's is the same."""
    url = storage.join(plan.folder, PLAN)
    if not storage.exists(url):
        with _unless_there(partial(storage.exists, url)):
            storage.create(url, (json.dumps(plan.facts, indent=1) + "\n").encode())
        require_same_plan(plan)


@contextmanager
def _unless_there(there: Callable[[], object]) -> Iterator[None]:
    """Ignores an OSError while writing what all workers write alike, if it is there: another worker that was done first
    may have removed this one's temporary file."""
    try:
        yield
    except OSError:
        if not there():
            raise
