"""What one node is, what it sees of the others, and how fast the links between nodes are."""

import hashlib
import os
import platform
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl
from torch.distributed import ProcessGroup, Store

from configs import storage
from configs.errors import UserError, one_line
from train.watchdog import call

PACKAGES = ("torch", "deepspeed", "accelerate", "safetensors", "webdataset")
OURS = ("configs", "model", "data_pipeline", "sampling", "train", "launch")
GPUS = "GPUs"  # among the versions: what kind, how many, which driver
GIB = 2**30
CLOCK_READINGS = 10
MORE_S = 10.0  # beyond the limit of gloo and NCCL, whose errors say more
SYNC_S = 5.0  # network file systems show a new file of another machine only after a while


@dataclass(frozen=True)
class SharedPath:
    """A folder or bucket as one node sees it."""

    url: str
    error: str = ""  # why this node cannot write there
    unread: tuple[int, ...] = ()  # nodes whose file this one cannot read


@dataclass(frozen=True)
class NodeReport:
    """A node, and what it sees of the others."""

    node: int
    host: str
    address: str  # where its processes let others find them
    versions: dict[str, str]
    gpu_free: tuple[float, ...]  # share of the memory of each GPU that torch may use
    disk_gib: float  # free where runs are written to
    shm_gib: float  # free in /dev/shm, which loaders and NCCL talk through
    paths: tuple[SharedPath, ...] = ()
    unreached: tuple[str, ...] = ()  # `node at address: why` of those that cannot be connected to

    def __str__(self) -> str:
        return f"node {self.node} ({self.host})"


def software() -> dict[str, str]:
    """Version by name. Ours is a digest of the source files, since two checkouts may have the same number."""
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    versions["nccl"] = ".".join(map(str, nccl.version())) if torch.version.cuda else "None"
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    root = Path(__file__).parent.parent
    sources = sorted(path for folder in OURS for path in (root / folder).rglob("*.py"))
    return {**versions, "worldloom": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]}


def gpus() -> tuple[str, tuple[float, ...]]:
    """What kind of GPUs torch may use and with which driver, and the free share of each one's memory."""
    count, driver = torch.cuda.device_count(), Path("/proc/driver/nvidia/version")
    kinds = Counter(torch.cuda.get_device_name(i) for i in range(count))
    kind = ", ".join(f"{n} x {name}" for name, n in kinds.items()) or "none"
    number = re.search(r"\d+\.[\d.]+", driver.read_text()) if driver.is_file() else None
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    return f"{kind} (driver {number[0]})" if number else kind, tuple(free / total for free, total in memory)


def free_gib(folder: str) -> float:
    """Free space of the file system that `folder` is on, or will be on when it is made."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free / GIB


def address(env: Mapping[str, str]) -> str:
    """The IPv4 address at which this node's processes let others find them: that of the interface named for gloo, else
    the one that the host's name resolves to. Empty if there is none."""
    if interface := env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        addresses = psutil.net_if_addrs().get(interface, [])
        return next((entry.address for entry in addresses if entry.family == socket.AF_INET), "")
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def probe_file(url: str, token: str, node: int) -> str:
    """The file that a node writes to a shared folder or bucket."""
    return storage.join(url, f".doctor_{token}_{node}")


def probe_path(url: str, token: str, node: int, nodes: Iterable[int]) -> SharedPath:
    """Writes this node's file and reads those of all nodes."""
    error = ""
    try:
        if not storage.is_s3(url) and not Path(url).is_dir():
            raise UserError("there is no such folder")
        storage.write_text(probe_file(url, token, node), token)
    except (OSError, ValueError) as problem:
        error = one_line(problem)

    def unread(other: int) -> bool:
        with suppress(OSError):
            return storage.read_bytes(probe_file(url, token, other)) != token.encode()
        return True

    deadline, left = time.monotonic() + SYNC_S, tuple(nodes)
    while (left := tuple(filter(unread, left))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return SharedPath(url, error, left)


@dataclass(frozen=True)
class Links:
    """What the nodes have measured between each other."""

    mb_per_s: tuple[tuple[float, ...], ...] = ()  # 1e6 bytes, from each node (row) to each other
    ahead_s: tuple[float, ...] = ()  # of each node's clock, against that of node 0


def measure(store: Store, node: int, nodes: int, megabytes: float, limit_s: float) -> Links:
    """Links of all nodes, between the first GPU of each where there are any, and clocks; the same on every node."""
    gpu, timeout = torch.cuda.is_available(), timedelta(seconds=limit_s)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # report an error, do not end the process
    dist.init_process_group("gloo", store=store, rank=node, world_size=nodes, timeout=timeout)
    group = dist.new_group(backend="nccl" if gpu else "gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    data = torch.zeros(max(1, int(megabytes * 1e6 / 4)), device="cuda:0" if gpu else "cpu")
    rates, clocks = torch.zeros(nodes, nodes), torch.zeros(CLOCK_READINGS, nodes, dtype=torch.float64)
    for peer in rounds(node, nodes):
        dist.monitored_barrier(timeout=timeout)
        for sender in () if peer is None else sorted((node, peer)):
            seconds = call(f"talking to node {peer}", limit_s + MORE_S, _transfer, data, sender == node, peer, group)
            if sender == node:
                rates[node, peer] = data.nbytes / seconds / 1e6
    for i in range(CLOCK_READINGS):
        dist.barrier()
        clocks[i, node] = time.time()
    dist.all_reduce(rates)
    dist.all_reduce(clocks)
    dist.destroy_process_group()
    return Links(tuple(map(tuple, rates.tolist())), clocks_ahead(clocks))


def rounds(node: int, nodes: int) -> list[int | None]:
    """The peer of a node in every round (None: it waits): all pairs meet once, and no node has two at a time."""
    peers = [node ^ i for i in range(1, 1 << (nodes - 1).bit_length())]
    return [peer if peer < nodes else None for peer in peers]


def clocks_ahead(readings: Tensor) -> tuple[float, ...]:
    """Seconds by which each clock is ahead of the first, from (readings, nodes) at about the same moments: the smallest
    difference, since a reading that comes late makes it larger."""
    ahead = readings - readings[:, :1]
    return tuple(ahead.gather(0, ahead.abs().argmin(0, keepdim=True))[0].tolist())


def _transfer(data: Tensor, sending: bool, peer: int, group: ProcessGroup) -> float:
    """Sends `data` one way and an answer back, twice; the seconds that the faster time took."""
    answer, seconds = torch.zeros(1), []
    for _ in range(2):
        start = time.perf_counter()
        if sending:
            dist.send(data, peer, group=group)
            dist.recv(answer, peer)
        else:
            dist.recv(data, peer, group=group)
            data[:1].item()  # it has arrived, on a GPU too
            dist.send(answer, peer)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
