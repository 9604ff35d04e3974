"""How fast ranks talk to each other, and how far apart their nodes' clocks are; `accelerate launch` starts this."""

import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from configs import to_dict
from configs.errors import FileInTheWayError, one_line
from configs.files import write_text
from launch.meeting import said, wait_for
from launch.timed import Doing, within

PINGS = 10
TRIAL_MB = 0.25  # sent first, to see how much may be sent
TRANSFER_S = 0.5  # that a transfer may take
GRACE_S = 10.0  # by which ranks may end later than the first


@dataclass(frozen=True)
class LinksConfig:
    """What `python -m launch links` is told."""

    report: str  # file that a node's first rank writes when it has ended; the first node's holds what all ranks say
    device: Literal["cpu", "cuda"]
    megabytes: float
    timeout_s: float


@dataclass(frozen=True)
class Clock:
    """Of another node, against the first node's."""

    node: int
    ahead_s: float
    round_trip_s: float  # the shortest; `ahead_s` is right to half of it


@dataclass(frozen=True)
class Link:
    """Between two ranks, with all pairs of the same round at work at the same time."""

    ranks: tuple[int, int]
    there_mb_per_s: float  # 1e6 bytes, from the first to the second
    back_mb_per_s: float
    latency_ms: float  # one way, half of there and back

    @property
    def mb_per_s(self) -> float:
        """The slower way, for which all of a collective waits."""
        return min(self.there_mb_per_s, self.back_mb_per_s)


@dataclass(frozen=True)
class RankReport:
    """What one rank has measured: links to higher ranks; the first one the clocks and what all do together too."""

    rank: int
    node: int
    backend: str
    links: tuple[Link, ...] = ()
    clocks: tuple[Clock, ...] = ()
    all_reduce_mb_per_s: float | None = None  # per rank, as NCCL's tests count it (bus bandwidth)
    error: str = ""


@dataclass(frozen=True)
class Ranks:
    """What a node's first rank writes down."""

    ranks: tuple[RankReport, ...]


@dataclass(frozen=True)
class Seat:
    """Of a rank among all: `nodes` with `local` ranks each."""

    rank: int
    ranks: int
    local: int

    @property
    def node(self) -> int:
        return self.rank // self.local

    def partners(self) -> list[int]:
        """The rank to talk to in every round, none is itself: first its like on every other node, then those of its
        own node."""
        node, mine = divmod(self.rank, self.local)
        away = [row[node] * self.local + mine for row in rounds(self.ranks // self.local)]
        return away + [node * self.local + row[mine] for row in rounds(self.local)]


def rounds(n: int) -> list[list[int]]:
    """Who meets whom (n) in every round, so that all pairs of `n` meet once, as many at a time as can; who meets
    nobody meets itself. The circle method of tournaments."""
    even = n + n % 2
    circle, found = list(range(even)), []
    for _ in range(even - 1):
        met = list(range(n))
        for a, b in zip(circle, reversed(circle), strict=True):
            if a < n and b < n:
                met[a] = b
        found.append(met)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found if n > 1 else []


def clock_ahead(pings: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds by which the other's clock is ahead, and the round trip that says how sure that is, from (sent here,
    read there, received here): of the quickest ping, whose two ways are the most alike."""
    sent, there, received = min(pings, key=lambda ping: ping[2] - ping[0])
    return there - (sent + received) / 2, received - sent


def links(config: LinksConfig) -> int:
    """What the doctor starts on every rank: clocks, transfers between pairs of ranks, all ranks together."""
    if Path(config.report).exists():
        raise FileInTheWayError(f"report={config.report} is there already; name another file")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # an error is to be reported, not to end the process
    timeout = timedelta(seconds=config.timeout_s)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    where = Seat(rank, ranks, int(os.environ["LOCAL_WORLD_SIZE"]))
    measured, error = within(
        config.timeout_s + GRACE_S / 2, partial(_measure, config, where, PrefixStore("group", store))
    )
    own = measured or RankReport(rank, where.node, _backend(config.device), error=error)
    with suppress(RuntimeError):  # the store is gone with the first node, or the way to it
        store.set(f"doctor/{rank}", json.dumps(to_dict(own)))
    if rank % where.local == 0:
        found = _collect(store, where) if rank == 0 else [own]
        write_text(config.report, json.dumps(to_dict(Ranks(tuple(found)))))
    os._exit(0)  # a thread that waits for a lost peer cannot be ended otherwise


def _collect(store: Store, where: Seat) -> list[RankReport]:
    """What the ranks say, without those that say nothing within the grace."""
    keys = {f"doctor/{rank}": replace(where, rank=rank) for rank in range(where.ranks)}
    wait_for(store, list(keys), GRACE_S)
    reports = []
    for key, seat in keys.items():
        if store.check([key]):
            try:
                reports.append(said(store, key, RankReport))
            except ConnectionError as error:
                reports.append(RankReport(seat.rank, seat.node, "", error=one_line(error)))
    return reports


def _backend(device: str) -> str:
    return "nccl" if device == "cuda" and torch.cuda.is_available() else "gloo"


def _measure(config: LinksConfig, where: Seat, store: Store, doing: Doing) -> RankReport:
    backend, timeout = _backend(config.device), timedelta(seconds=config.timeout_s)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    doing.name = f"joining all {where.ranks} ranks"
    both = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend  # clocks are read over gloo
    dist.init_process_group(both, store=store, rank=where.rank, world_size=where.ranks, timeout=timeout)
    doing.name = "comparing clocks"
    clocks = _clocks(where)
    found = []
    for partner in where.partners():
        doing.name = f"talking to rank {partner} over {backend}"
        if partner != where.rank:
            link = _talk((where.rank, partner), device, config.megabytes)
            found += [link] if where.rank < partner else []
        dist.all_reduce(torch.zeros(1))  # the next round begins for all at once
    doing.name = f"an all-reduce of all ranks over {backend}"
    together = _all_reduce(where.ranks, device, config.megabytes, min((link.mb_per_s for link in found), default=1e4))
    return RankReport(where.rank, where.node, backend, tuple(found), clocks, together if where.rank == 0 else None)


def _clocks(where: Seat) -> tuple[Clock, ...]:
    """The first rank asks the first rank of every other node, one after the other; the others give nothing."""
    read, found = torch.zeros(1, dtype=torch.float64), []
    if where.rank == 0:
        for other in range(where.local, where.ranks, where.local):
            pings = []
            for _ in range(PINGS):
                sent = time.time()
                dist.send(read, other)
                dist.recv(read, other)
                pings.append((sent, read.item(), time.time()))
            found.append(Clock(other // where.local, *clock_ahead(pings)))
    elif where.rank % where.local == 0:
        for _ in range(PINGS):
            dist.recv(read, 0)
            dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
    return tuple(found)


def _talk(ranks: tuple[int, int], device: torch.device, megabytes: float) -> Link:
    """The link between this rank and the second of `ranks`; both must call, and the lower one's figures count."""
    own, partner = ranks
    first, word = own < partner, torch.zeros(1, device=device)

    def one_way(count: int, there: bool) -> float:
        """Seconds for `count` floats to the higher rank, or from it, and one float the other way."""
        buffer = torch.zeros(count, device=device)
        began = _now(device)
        for data, outward in ((buffer, True), (word, False)) if there else ((word, True), (buffer, False)):
            (dist.send if outward == first else dist.recv)(data, partner)
        return _now(device) - began

    small = _floats(min(TRIAL_MB, megabytes))
    one_way(small, there=True)  # the connection is made
    latency_s = min(one_way(1, there=True) for _ in range(PINGS)) / 2
    rates = []
    for there in (True, False):
        count = torch.tensor([_within_time(small, one_way(small, there), megabytes)])
        (dist.send if first else dist.recv)(count, partner)  # the lower rank decides
        seconds = max(min(one_way(int(count), there) for _ in range(2)) - latency_s, 1e-9)
        rates.append(4 * int(count) / seconds / 1e6)
    return Link(ranks, rates[0], rates[1], 1e3 * latency_s)


def _all_reduce(ranks: int, device: torch.device, megabytes: float, slowest: float) -> float | None:
    """Bus bandwidth (MB/s) of all ranks together: their own rate, whatever their number."""
    if ranks == 1:
        return None
    least = torch.tensor([slowest])
    dist.all_reduce(least, dist.ReduceOp.MIN)
    count = _floats(min(megabytes, max(TRIAL_MB, float(least) * TRANSFER_S)))
    buffer, seconds = torch.zeros(count, device=device), []
    for _ in range(3):
        began = _now(device)
        dist.all_reduce(buffer)
        seconds.append(_now(device) - began)
    return 2 * (ranks - 1) / ranks * 4 * count / statistics.median(seconds) / 1e6


def _floats(megabytes: float) -> int:
    return max(1, int(megabytes * 1e6 / 4))


def _within_time(count: int, seconds: float, megabytes: float) -> int:
    """How many floats to send so that it takes no longer than it may, after `count` took `seconds`."""
    return min(_floats(megabytes), max(count, int(count * TRANSFER_S / max(seconds, 1e-6))))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
