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
from dataclasses import asdict
from functools import partial
from itertools import groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from tqdm import tqdm

from configs import storage
from configs.errors import UserError
from configs.files import require_other_files, sweep
from data_pipeline.clips import BadEpisodeError, Encoder, Run, cut_episodes, encode_clips
from data_pipeline.plan import EncodeConfig, LeftOut, Plan, ShardJob, make_plans
from data_pipeline.prefetch import run_ahead
from data_pipeline.shards import MANIFEST, Index, Shapes, clip_shapes, index_url, read_index, save_manifest, write_shard
from data_pipeline.types import Clip, Manifest, ShardInfo
from data_pipeline.verify import FAULT, require_clips
from model.codec import load_codec
from model.vision import load_vision

T = TypeVar("T")
Decoded = tuple[ShardJob, Run | BadEpisodeError | None]
LEFT_OUT = "left_out.json"
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


def find_index(job: ShardJob) -> Index | None:
    """The shard's index if both are there, the shard in full length; its bytes are not compared.

    A shard that leaves episodes out does not count for a worker that is to stop at them.
    """
    try:
        index = read_index(job.url)
        whole = not index.info.clips or storage.path(job.url).stat().st_size == index.info.bytes
    except FileNotFoundError:
        return None
    return None if not whole or (index.left_out and job.config.on_bad_recording == "stop") else index


def require_whole(job: ShardJob, shapes: Shapes) -> None:
    """Raises UserError, or FileNotFoundError, if the shard is to be made again. Reads all of it."""
    info, entries, left_out = read_index(job.url)
    if left_out:  # the recording may have been mended
        raise UserError(f"made without {', '.join(left_out)}, tried again")
    if info.url != storage.name_of(job.url) or len(entries) != job.clips:
        raise UserError("its index is of another shard")
    require_clips(job.url, info, entries, shapes)


def sort_jobs(jobs: Sequence[T]) -> list[T]:
    """This worker's share, then the others' in random order, so that two workers that help out seldom choose the same
    job. A worker that no launcher has numbered has no share of its own."""
    rank, world = from_launcher("RANK", -1), from_launcher("WORLD_SIZE", 1)
    others = [job for i, job in enumerate(jobs) if i % world != rank]
    return [*(jobs[rank::world] if rank >= 0 else ()), *random.sample(others, len(others))]


def from_launcher(name: str, alone: int) -> int:
    """The variable that a launcher such as `accelerate launch` sets for this process, or `alone`."""
    return int(os.environ.get(name, alone))


def encode(config: EncodeConfig) -> Encoded:
    """Makes the shards that are not there yet, beside any number of other workers, then each set's manifest.

    Killed at any moment and started again, with as many workers or others, it ends with the same bytes. An episode that
    cannot be read, and a folder that holds the shards of another plan, raise UserError before a shard is written. With
    `on_bad_recording: skip`, such an episode, and one that cannot be decoded, is left out; the shard's index says so.
    """
    outs = [config.out, *(storage.join(config.out, split) for split in ("train", "heldout"))]
    require_other_files(outs, {"source": config.source, "vision_weights": config.vision_weights})
    encoder = load_encoder(config)
    plans = make_plans(config, encoder.codec)
    for plan in plans:
        plan.require_same()
    began = time.perf_counter()
    indexes, made = make_all(encoder, [job for plan in plans for job in plan.jobs])
    manifests, left_out = zip(*[_finish_set(encoder, plan, indexes) for plan in plans], strict=True)
    return Encoded(
        clips=sum(manifest.clips for manifest in manifests),
        new_clips=sum(info.clips for info in made),
        shards=sum(len(manifest.shards) for manifest in manifests),
        manifests=tuple(storage.join(plan.folder, MANIFEST) for plan in plans),
        seconds=time.perf_counter() - began,
        bytes=sum(info.bytes for info in made),
        left_out=left_out,
    )


def load_encoder(config: EncodeConfig) -> Encoder:
    """Codec and vision tower on this worker's device."""
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    index = from_launcher("LOCAL_RANK", 0)
    device = torch.device("cuda", index % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    tower = load_vision(config.vision_weights).to(device) if config.vision_weights else None
    return Encoder(load_codec(config.codec).to(device), tower, config, device)


def _finish_set(encoder: Encoder, plan: Plan, indexes: Mapping[str, Index]) -> tuple[Manifest, LeftOut]:
    """Writes the manifest, and what the set leaves out; removes what killed workers left."""
    of_set = [indexes[job.url] for job in plan.jobs]
    infos = [index.info for index in of_set if index.info.clips]
    bad = {name: why for index in of_set for name, why in index.left_out.items()}
    if not infos:
        name, why = next(iter(bad.items()))
        raise UserError(f"no {plan.split} episode can be decoded; {name}: {why}")
    manifest, left_out = plan.manifest(encoder.codec, infos), plan.left_out(bad)
    storage.write_text(storage.join(plan.folder, LEFT_OUT), json.dumps(asdict(left_out), indent=1) + "\n")
    save_manifest(manifest, storage.join(plan.folder, MANIFEST))
    sweep(Path(plan.folder))
    return manifest, left_out


def drop_faulty(config: EncodeConfig) -> list[str]:
    """Removes the indexes of shards that are altered, damaged or made without an episode that could not be decoded, so
    that `encode` makes these shards again; a line for each. Of several workers, each reads its share."""
    dropped, codec = list[str](), load_encoder(config).codec
    for plan in make_plans(config, codec):
        plan.require_same()
        shapes = clip_shapes(plan.manifest(codec, ()))
        for job in plan.jobs[from_launcher("RANK", 0) :: from_launcher("WORLD_SIZE", 1)]:
            try:
                require_whole(job, shapes)
            except FAULT as error:
                storage.remove(index_url(job.url))
                dropped.append(f"{job.url}: {error}")
    return dropped


def make_all(encoder: Encoder, jobs: Sequence[ShardJob]) -> tuple[dict[str, Index], list[ShardInfo]]:
    """The shards' indexes by url, when all are there at once: another worker's `repair` may remove some meanwhile. And
    the shards that this worker wrote."""
    made = list[ShardInfo]()
    while True:
        made += make_missing(encoder, sort_jobs(jobs))
        indexes = {job.url: index for job in jobs if (index := find_index(job))}
        if len(indexes) == len(jobs):
            return indexes, made


def make_missing(encoder: Encoder, jobs: Sequence[ShardJob]) -> list[ShardInfo]:
    """Makes those of the shards that are not there when it comes to them; gives what it wrote. While the codec works,
    the next frames are decoded and the last shard is written."""
    quiet = from_launcher("LOCAL_RANK", 0) > 0 or None  # None: shown on a terminal
    total, written = sum(job.clips for job in jobs), list[Future[ShardInfo | None]]()
    with (
        tqdm(total=total, desc="encode", unit="clip", smoothing=0.1, disable=quiet) as bar,
        ThreadPoolExecutor(1, "write") as pool,
        closing(
            run_ahead(repeat(partial(next, _decode(jobs, bar), None)), 1, AHEAD * encoder.config.batch, "decode")
        ) as decoded,
    ):
        for job, pairs in groupby(iter(partial(next, decoded), None), key=itemgetter(0)):
            clips = list[Clip]()
            try:
                for clip in encode_clips(encoder, job.episodes, _runs(pairs)):
                    clips.append(clip)
                    bar.update()
            except BadEpisodeError:
                if job.config.on_bad_recording == "stop":
                    raise
                bar.update(-len(clips))  # the next job is this one without it
                continue
            if written:
                written[-1].result()  # no more than two shards are in memory
            written.append(pool.submit(_write, job, clips))
    return [info for shard in written if (info := shard.result())]


def _decode(jobs: Sequence[ShardJob], bar: tqdm) -> Iterator[Decoded]:
    for job in jobs:
        if find_index(job):
            bar.update(job.clips)
        else:
            yield from _decode_job(job)


def _decode_job(job: ShardJob) -> Iterator[Decoded]:
    """The job with each of its runs, then with None; or with what is wrong with an episode, then the job without it."""
    try:
        yield from ((job, run) for run in cut_episodes(job.episodes, job.config))
        yield job, None
    except BadEpisodeError as bad:
        yield job, bad
        yield from _decode_job(job.without(bad.episode, bad))


def _runs(decoded: Iterator[Decoded]) -> Iterator[Run]:
    for _, run in decoded:
        if isinstance(run, BadEpisodeError):
            raise run
        if run:
            yield run


def _write(job: ShardJob, clips: list[Clip]) -> ShardInfo | None:
    return None if find_index(job) else write_shard(job.url, clips, job.left_out)
