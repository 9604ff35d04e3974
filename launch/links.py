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

from train.watchdog import call

PINGS = 10
MORE_S = 10.0  # beyond the limit of gloo and NCCL, whose errors say more


@dataclass(frozen=True)
class Link:
    """From one node to another, while all other pairs of the round work too."""

    source: int
    target: int
    mb_per_s: float  # 1e6 bytes
    latency_ms: float  # one way: half a round trip
    ahead_s: float  # of the target's clock, within `latency_ms`


@dataclass(frozen=True)
class Links:
    """What one node has measured."""

    links: tuple[Link, ...]


def peers(node: int, nodes: int) -> list[int | None]:
    """The peer of a node in every round (None: it waits): all pairs meet once, and no node has two at a time."""
    met = [node ^ i for i in range(1, 1 << (nodes - 1).bit_length())]
    return [peer if peer < nodes else None for peer in met]


def clock_ahead(pings: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds by which the peer's clock is ahead, and the round trip, which bounds the error. From (sent here, read
    there, received here) of the quickest ping, whose two ways are the most alike."""
    sent, there, received = min(pings, key=lambda ping: ping[2] - ping[0])
    return there - (sent + received) / 2, received - sent


def measure(store: Store, node: int, nodes: int, megabytes: float, limit_s: float) -> Links:
    """All links from this node; between the first GPU of each where there are any."""
    gpu, timeout = torch.cuda.is_available(), timedelta(seconds=limit_s)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # report an error, do not end the process
    dist.init_process_group("gloo", store=store, rank=node, world_size=nodes, timeout=timeout)
    group = dist.new_group(backend="nccl" if gpu else "gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    data = torch.zeros(max(1, int(megabytes * 1e6 / 4)), device="cuda:0" if gpu else "cpu")
    links = []
    for peer in peers(node, nodes):
        call("waiting for all nodes", limit_s + MORE_S, dist.barrier)
        if peer is not None:
            for sender in sorted((node, peer)):
                link = call(f"talking to node {peer}", limit_s + MORE_S, _talk, data, node, peer, sender, group)
                links += [link] if sender == node else []
    call("waiting for all nodes", limit_s + MORE_S, dist.barrier)
    dist.destroy_process_group()
    return Links(tuple(links))


def _talk(data: Tensor, node: int, peer: int, sender: int, group: ProcessGroup) -> Link:
    """The link to `peer`, of use where `node` is the sender."""
    pings = [_exchange(data[:1], sender == node, peer, group) for _ in range(PINGS)]
    transfers = [_exchange(data, sender == node, peer, group) for _ in range(2)]
    ahead_s, round_trip_s = clock_ahead(pings)
    took_s = min(received - sent for sent, _, received in transfers) - round_trip_s / 2
    return Link(node, peer, data.nbytes / max(took_s, 1e-9) / 1e6, 1e3 * round_trip_s / 2, ahead_s)


def _exchange(data: Tensor, sending: bool, peer: int, group: ProcessGroup) -> tuple[float, float, float]:
    """Sends `data` one way and the receiver's clock back: (sent here, read there, received here) for the sender."""
    clock, sent = torch.zeros(1, dtype=torch.float64), time.time()
    if sending:
        dist.send(data, peer, group=group)
        dist.recv(clock, peer)
    else:
        dist.recv(data, peer, group=group)
        data[:1].item()  # it has arrived, on a GPU too
        dist.send(torch.tensor([time.time()], dtype=torch.float64), peer)
    return sent, clock.item(), time.time()
