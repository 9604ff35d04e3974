"""Recordings to shards of latents, by any number of workers: claim a shard, encode it, write it, the manifest last."""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby
from typing import NamedTuple

import torch
from tqdm import tqdm

from configs import storage
from configs.errors import UserError
from configs.files import require_other_files
from data_pipeline.claims import Claims
from data_pipeline.clips import BadEpisodeError, Encoder, Run, cut_episodes, encode_clips, read_ahead
from data_pipeline.left_out import LEFT_OUT, LeftOut
from data_pipeline.plan import PLAN, EncodeConfig, Plan, describe_set, make_plans, require_same_plan, without_bad
from data_pipeline.shards import MANIFEST, Index, save_manifest, write_shard
from data_pipeline.types import Clip
from data_pipeline.units import Unit, list_units
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
    left_out: tuple[LeftOut, ...]  # of each set


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
    holds the shards of another plan. With `on_bad_recording: skip` such an episode, and one that cannot be decoded,
    is left out; the shard's index says so.
    """
    _require_other_place(config)
    encoder = load_encoder(config)
    plans = make_plans(config, encoder.codec)
    folders = [storage.join(config.out, plan.split) for plan in plans]
    for plan, folder in zip(plans, folders, strict=True):
        require_same_plan(plan, folder)
    for plan, folder in zip(plans, folders, strict=True):
        _settle_plan(plan, folder)
    units = [list_units(config, plan) for plan in plans]
    claims = Claims(storage.join(config.out, "claims"), config.stale_s)
    with claims.renewed():
        worker = Worker(config, encoder, claims, sum(unit.clips for of_set in units for unit in of_set))
        every = iter(worker.make_all([unit for of_set in units for unit in of_set]))
    indexes = [[next(every) for _ in of_set] for of_set in units]
    left_out = tuple(_collect_left_out(config, *one) for one in zip(plans, indexes, strict=True))
    manifests = tuple(storage.join(folder, MANIFEST) for folder in folders)
    for plan, of_set, left, manifest in zip(plans, indexes, left_out, manifests, strict=True):
        infos = [index.info for index in of_set if index.info.clips]
        with _unless_there(partial(storage.exists, manifest)):
            left.save(storage.join(storage.parent(manifest), LEFT_OUT))
            save_manifest(describe_set(config, encoder.codec, plan, infos), manifest)
    for folder in folders:
        storage.remove_unfinished(folder)  # of killed workers; those that still write what is there find it there
    claims.clear()
    made = [index.info.clips for of_set in indexes for index in of_set if index.info.clips]
    took, waits = time.perf_counter() - worker.clock.start, worker.clock.shares()
    return Encoded(sum(made), worker.clips, len(made), manifests, took, worker.bytes, waits, left_out)


def _require_other_place(config: EncodeConfig) -> None:
    """Shards inside of a source would be taken for recordings by every later command."""
    written = [storage.join(config.out, name) for name in ("train", "heldout", "claims")]
    require_other_files([config.out, *written], {"source": config.source, "vision_weights": config.vision_weights})


def _collect_left_out(config: EncodeConfig, plan: Plan, indexes: Sequence[Index]) -> LeftOut:
    bad = {name: why for index in indexes for name, why in index.left_out.items()}
    if not any(index.info.clips for index in indexes):
        name, why = next(iter(bad.items()))
        raise UserError(f"no {plan.split} episode can be decoded; {name}: {why}")
    return without_bad(config, plan, bad)


def load_encoder(config: EncodeConfig) -> Encoder:
    """Codec and vision tower on this worker's device."""
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda", place("LOCAL_RANK", 0) % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    tower = load_vision(config.vision_weights) if config.vision_weights else None
    codec = load_codec(config.codec).to(device)
    return Encoder(codec, tower.to(device) if tower else None, config, device)


class Worker:
    """Makes units until all are there."""

    def __init__(self, config: EncodeConfig, encoder: Encoder, claims: Claims, total: int) -> None:
        self.config, self.encoder, self.claims, self.total = config, encoder, claims, total
        self.clock, self.clips, self.bytes = Clock(), 0, 0
        self._stop = threading.Event()

    def make_all(self, units: Sequence[Unit]) -> list[Index]:
        """All units' indexes, when all are there at once: another worker's `repair` may delete some anew."""
        while True:
            self.make(units)
            found = [unit.complete() for unit in units]
            if all(found):
                return [index for index in found if index]

    def make(self, units: Sequence[Unit]) -> None:
        """Returns when every unit was there once, whoever made it. Raises what goes wrong with one of this worker's."""
        self._stop.clear()
        quiet = place("LOCAL_RANK", 0) > 0 or None  # None: shown on a terminal
        bar = tqdm(total=self.total, desc="encode", unit="clip", smoothing=0.1, disable=quiet)
        runs = read_ahead(self._runs(units, bar))
        writing: Future[None] | None = None
        with bar, ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
            try:
                timed = self.clock.waiting("frames", runs)
                for _, group in groupby(timed, key=lambda item: (item[0].key, len(item[0].left_out))):
                    unit, clips = self._encode(group, bar)
                    if clips is None:
                        continue
                    self._finish(writing)
                    writing = pool.submit(self._write, unit, clips)
                self._finish(writing)
            finally:
                self._stop.set()  # else the reading thread would wait for others
                runs.close()

    def _encode(self, group: Iterator[tuple[Unit, list[Run]]], bar: tqdm) -> tuple[Unit, list[Clip] | None]:
        """One unit and its clips, from the runs of frames that the reading thread brings, none being the end; no clips
        if they break off before, since an episode is bad and the unit begins anew without it."""
        unit, first = next(group)
        clips, whole = [], False

        def batches() -> Iterator[list[Run]]:
            nonlocal whole
            for _, runs in chain([(unit, first)], group):
                if not runs:
                    whole = True
                    return
                yield runs

        upcoming = batches()
        for clip in encode_clips(self.encoder, unit.episodes, upcoming):
            clips.append(clip)
            bar.update()
        deque(upcoming, maxlen=0)  # the frames behind the last clip may be bad, too
        if not whole:
            bar.update(-len(clips))
            return unit, None
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
            self.bytes += write_shard(unit.folder, unit.name, clips, unit.left_out).bytes
        self.claims.release(unit.key)

    def _runs(self, units: Sequence[Unit], bar: tqdm) -> Iterator[tuple[Unit, list[Run]]]:
        """Batches of runs of one claimed unit after the other, none at the end of each; where an episode is bad, and to
        be skipped, all of its unit anew without it."""
        for unit in self._claimed(units, bar):
            whole = False
            while not whole:
                try:
                    for runs in cut_episodes(unit.episodes, self.config):
                        yield unit, runs
                    whole = True
                except BadEpisodeError as bad:
                    if self.config.on_bad_recording == "stop":
                        raise
                    planned, unit = unit.clips, unit.without(bad)
                    bar.update(planned - unit.clips)
            yield unit, []

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


def place(name: str, alone: int) -> int:
    """This process's place among those that were started together, by the launcher's word for it."""
    return int(os.environ.get(name, alone))
