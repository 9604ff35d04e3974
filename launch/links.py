"""How fast nodes talk to each other, and how far apart their clocks are."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Store

PINGS = 10


@dataclass
class Phase:
    """What is being done; said when it fails or does not end."""

    name: str = ""


@dataclass(frozen=True)
class Link:
    """From one node to another, with all pairs of the same round at work at the same time."""

    source: int
    target: int
    mb_per_s: float  # 1e6 bytes
    latency_ms: float  # one way, half of there and back
    ahead_s: float  # of the target's clock; right to `latency_ms`


@dataclass(frozen=True)
class Measurement:
    """What one node has measured."""

    links: tuple[Link, ...] = ()
    all_reduce_mb_per_s: float | None = None  # per node, as NCCL's tests count it (bus bandwidth)
    error: str = ""


def peers(node: int, nodes: int) -> list[int | None]:
    """The peer of a node in every round (none: it waits): all pairs meet once, and no node has two at a time."""
    met = [node ^ i for i in range(1, 1 << (nodes - 1).bit_length())]
    return [peer if peer < nodes else None for peer in met]


def clock_ahead(pings: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds by which the other's clock is ahead, and the round trip that says how sure that is, from (sent here,
    read there, received here): of the quickest ping, whose two ways are the most alike."""
    sent, there, received = min(pings, key=_took)
    return there - (sent + received) / 2, received - sent


def _took(ping: tuple[float, float, float]) -> float:
    return ping[2] - ping[0]


def measure(store: Store, node: int, nodes: int, megabytes: float, timeout: timedelta, phase: Phase) -> Measurement:
    """All links from this node, and an all-reduce of all; between the first GPU of each where there are any."""
    gpu = torch.cuda.is_available()
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # an error is to be reported, not to end the process
    phase.name = f"joining all {nodes} nodes"
    dist.init_process_group("gloo", store=store, rank=node, world_size=nodes, timeout=timeout)
    group = dist.new_group(backend="nccl" if gpu else "gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    data = torch.zeros(max(1, int(megabytes * 1e6 / 4)), device="cuda:0" if gpu else "cpu")
    links = []
    for peer in peers(node, nodes):
        phase.name = "waiting for all nodes"
        dist.barrier()
        if peer is None:
            continue
        phase.name = f"talking to node {peer}"
        for sender in sorted((node, peer)):
            pings = [_exchange(data[:1], sender == node, peer, group) for _ in range(PINGS)]
            sent, _, received = min((_exchange(data, sender == node, peer, group) for _ in range(2)), key=_took)
            if sender == node:
                ahead_s, round_trip_s = clock_ahead(pings)
                rate = data.nbytes / max(received - sent - round_trip_s / 2, 1e-9) / 1e6
                links.append(Link(node, peer, rate, 1e3 * round_trip_s / 2, ahead_s))
    phase.name = "an all-reduce of all nodes"
    seconds = min(_all_reduce(data, group) for _ in range(3))
    dist.destroy_process_group()
    return Measurement(tuple(links), 2 * (nodes - 1) / nodes * data.nbytes / seconds / 1e6)


def _exchange(data: Tensor, sending: bool, peer: int, group: ProcessGroup) -> tuple[float, float, float]:
    """`data` goes one way, the receiver's clock comes back: (sent here, read there, received here) for the sender."""
    clock, sent = torch.zeros(1, dtype=torch.float64), time.time()
    if sending:
        dist.send(data, peer, group=group)
        dist.recv(clock, peer)
    else:
        dist.recv(data, peer, group=group)
        data[:1].item()  # it has arrived, on a GPU too
        dist.send(torch.tensor([time.time()], dtype=torch.float64), peer)
    return sent, clock.item(), time.time()


def _all_reduce(data: Tensor, group: ProcessGroup) -> float:
    began = time.perf_counter()
    dist.all_reduce(data, group=group)
    data[:1].item()
    return time.perf_counter() - began
