"""Recordings to shards of latents, by any number of workers: claim a shard, encode it, write it, the manifest last."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from tqdm import tqdm

from configs.files import require_other_files
from data_pipeline import storage
from data_pipeline.claims import Claims
from data_pipeline.clips import Encoder, Run, cut_episodes, encode_clips, read_ahead
from data_pipeline.plan import (
    PLAN,
    SHARD,
    EncodeConfig,
    Plan,
    count_clips,
    describe_set,
    make_plans,
    require_same_plan,
)
from data_pipeline.shards import MANIFEST, find_fault, index_url, read_index, save_manifest, write_shard
from data_pipeline.types import Clip, Episode, ShardInfo
from model.codec import load_codec
from model.vision import load_vision

POLL_S = 0.5  # between two looks at the shards that others make


class Encoded(NamedTuple):
    """What a run of this worker did."""

    clips: int  # of the whole set
    new_clips: int  # made by this worker
    shards: int
    manifests: tuple[str, ...]
    seconds: float
    bytes: int  # written by this worker
    waits: dict[str, float]  # shares of the time in which the codec stood still, by what for


@dataclass(frozen=True)
class Unit:
    """A shard that is to be there."""

    folder: str
    name: str
    key: str  # of its claim
    episodes: tuple[Episode, ...]
    clips: int

    @property
    def url(self) -> str:
        return storage.join(self.folder, self.name)

    def complete(self) -> ShardInfo | None:
        """What its index says if shard and index are there in full length; their bytes are `verify`'s business."""
        try:
            info, _ = read_index(self.url)
            return info if storage.size(self.url) == info.bytes else None
        except FileNotFoundError:
            return None


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.start, self.spent = time.perf_counter(), {"frames": 0.0, "writing": 0.0}

    def waiting(self, what: str, items: Iterator) -> Iterator:
        """The same items; the time until each comes counts as spent on `what`."""
        while True:
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.spent[what] += time.perf_counter() - began
            yield item

    def shares(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return {what: seconds / elapsed for what, seconds in self.spent.items()}


def list_waits(shares: Mapping[str, float]) -> str:
    """Shares of the time that the codec waited for something, in words."""
    return ", ".join(f"{what} {share:.0%}" for what, share in shares.items())


def encode_recordings(config: EncodeConfig) -> Encoded:
    """Makes the shards that are not there yet, beside any number of other workers, then each set's manifest.

    Killed at any moment and started again, with as many workers or others, it ends with the same bytes. Raises
    ValueError in one line, before anything is written, for an episode that cannot be read and for a folder that
    holds the shards of another plan.
    """
    _require_other_place(config)
    encoder = load_encoder(config)
    plans = make_plans(config, encoder.codec)
    folders = {plan.split: storage.join(config.out, plan.split) for plan in plans}
    for plan in plans:
        require_same_plan(plan, folders[plan.split])
    for plan in plans:
        _settle_plan(plan, folders[plan.split])
    units = [unit for plan in plans for unit in _units(config, plan, folders[plan.split])]
    claims = Claims(storage.join(config.out, "claims"), config.stale_s)
    with claims.renewed():
        worker = Worker(config, encoder, claims, sum(unit.clips for unit in units))
        infos = worker.make_all(units)
    manifests = []
    for plan in plans:
        of_set = [info for unit, info in zip(units, infos, strict=True) if unit.folder == folders[plan.split]]
        manifests.append(storage.join(folders[plan.split], MANIFEST))
        with _unless_there(partial(storage.exists, manifests[-1])):
            save_manifest(describe_set(config, encoder.codec, plan, of_set), manifests[-1])
    for folder in folders.values():
        storage.remove_unfinished(folder)  # of killed workers; those that still write what is there find it there
    claims.clear()
    took = time.perf_counter() - worker.clock.start
    waits = worker.clock.shares()
    return Encoded(worker.total, worker.clips, len(units), tuple(manifests), took, worker.bytes, waits)


def _require_other_place(config: EncodeConfig) -> None:
    """Shards inside of a source would be taken for recordings by every later command."""
    written = [storage.join(config.out, name) for name in ("train", "heldout", "claims")]
    require_other_files([config.out, *written], {"source": config.source, "vision_weights": config.vision_weights})


def drop_faulty(config: EncodeConfig) -> list[str]:
    """Makes `encode_recordings` make anew what is altered or damaged; a line for each such shard.

    Reads every shard; of several workers, each reads its part.
    """
    rank, world = _place("RANK", 0), _place("WORLD_SIZE", 1)
    encoder = load_encoder(config)
    dropped = []
    for plan in make_plans(config, encoder.codec):
        folder = storage.join(config.out, plan.split)
        require_same_plan(plan, folder)
        for unit in _units(config, plan, folder)[rank::world]:
            fault = _find_fault(unit)
            if fault:
                storage.remove(index_url(unit.url))
                dropped.append(f"{unit.url}: {fault}")
    return dropped


def _find_fault(unit: Unit) -> str | None:
    try:
        info, entries = read_index(unit.url)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if info.url != unit.name or len(entries) != unit.clips:
        return "its index is of another shard"
    return find_fault(unit.url, info, entries)


def load_encoder(config: EncodeConfig) -> Encoder:
    """Codec and vision tower on this worker's device."""
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    device = (
        torch.device("cuda", _place("LOCAL_RANK", 0) % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    )
    tower = load_vision(storage.local(config.vision_weights)) if config.vision_weights else None
    codec = load_codec(storage.local(config.codec)).to(device)
    return Encoder(codec, tower.to(device) if tower else None, config, device)


class Worker:
    """Makes units until all are there."""

    def __init__(self, config: EncodeConfig, encoder: Encoder, claims: Claims, total: int) -> None:
        self.config, self.encoder, self.claims, self.total = config, encoder, claims, total
        self.clock, self.clips, self.bytes = Clock(), 0, 0
        self._stop = threading.Event()

    def make_all(self, units: Sequence[Unit]) -> list[ShardInfo]:
        """What all units' indexes say, when all are there at once: another worker's `repair` may delete some anew."""
        while True:
            self.make(units)
            found = [unit.complete() for unit in units]
            if all(found):
                return [info for info in found if info]

    def make(self, units: Sequence[Unit]) -> None:
        """Returns when every unit was there once, whoever made it. Raises what goes wrong with one of this worker's."""
        self._stop.clear()
        quiet = _place("LOCAL_RANK", 0) > 0 or None  # None: shown on a terminal
        bar = tqdm(total=self.total, desc="encode", unit="clip", smoothing=0.1, disable=quiet)
        runs = read_ahead(self._runs(units, bar))
        writing: Future[None] | None = None
        with bar, ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
            try:
                timed = self.clock.waiting("frames", runs)
                for _, group in groupby(timed, key=lambda item: item[0].key):
                    unit, clips = self._encode(group, bar)
                    self._finish(writing)
                    writing = pool.submit(self._write, unit, clips)
                self._finish(writing)
            finally:
                self._stop.set()  # else the reading thread would wait for others
                runs.close()

    def _encode(self, group: Iterator[tuple[Unit, list[Run]]], bar: tqdm) -> tuple[Unit, list[Clip]]:
        """One unit and its clips, from the runs of frames that the reading thread brings."""
        unit, first = next(group)
        batches = (runs for batch in ([first], (runs for _, runs in group)) for runs in batch)
        clips = []
        for clip in encode_clips(self.encoder, unit.episodes, batches):
            clips.append(clip)
            bar.update()
        self.clips += len(clips)
        written = self.bytes / 1e6 / (time.perf_counter() - self.clock.start)
        bar.set_postfix_str(f"{written:.1f} MB/s, waits for {list_waits(self.clock.shares())}")
        return unit, clips

    def _finish(self, writing: Future[None] | None) -> None:
        began = time.perf_counter()
        if writing is not None:
            writing.result()
        self.clock.spent["writing"] += time.perf_counter() - began

    def _write(self, unit: Unit, clips: list[Clip]) -> None:
        with _unless_there(unit.complete):
            self.bytes += write_shard(unit.folder, unit.name, clips).bytes
        self.claims.release(unit.key)

    def _runs(self, units: Sequence[Unit], bar: tqdm) -> Iterator[tuple[Unit, list[Run]]]:
        """Batches of runs of one claimed unit after the other."""
        for unit in self._claimed(units, bar):
            for runs in cut_episodes(unit.episodes, self.config):
                yield unit, runs

    def _claimed(self, units: Sequence[Unit], bar: tqdm) -> Iterator[Unit]:
        """Units that are not there and are this worker's to make; ends when no other is missing."""
        missing = list(units)
        while missing and not self._stop.is_set():
            others = []
            for unit in missing:
                if self._stop.is_set():
                    return
                if unit.complete():
                    bar.update(unit.clips)
                elif self.claims.take(unit.key):
                    if unit.complete():  # since it was looked at
                        self.claims.release(unit.key)
                        bar.update(unit.clips)
                    else:
                        yield unit
                else:
                    others.append(unit)
            if len(others) == len(missing):
                self._stop.wait(POLL_S)
            missing = others


def _units(config: EncodeConfig, plan: Plan, folder: str) -> list[Unit]:
    names = [SHARD.format(i) for i in range(len(plan.shards))]
    return [
        Unit(folder, name, f"{plan.split}-{name.removesuffix('.tar')}", episodes, count_clips(config, episodes))
        for name, episodes in zip(names, plan.shards, strict=True)
    ]


def _settle_plan(plan: Plan, folder: str) -> None:
    """Writes the plan, or finds that another worker's is the same."""
    url = storage.join(folder, PLAN)
    if not storage.exists(url):
        with _unless_there(partial(storage.exists, url)):
            storage.create(url, (json.dumps(plan.facts, indent=1) + "\n").encode())
        require_same_plan(plan, folder)


@contextmanager
def _unless_there(there: Callable[[], object]) -> Iterator[None]:
    """Writing what every worker writes alike: if another one swept the temporary file away, it had put all there."""
    try:
        yield
    except OSError:
        if not there():
            raise


def _place(name: str, alone: int) -> int:
    """This process's place among those that were started together, by the launcher's word for it."""
    return int(os.environ.get(name, alone))
