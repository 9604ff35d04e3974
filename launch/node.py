"""What one node is, what it sees of the others, and how fast its links to them are."""

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

PACKAGES = ("torch", "deepspeed", "accelerate", "safetensors", "webdataset", "worldloom")
OURS = ("configs", "model", "data_pipeline", "sampling", "train", "launch")
MISSING, NONE = "missing", "none"
GPUS = "GPUs"  # among the versions: what kind, how many, which driver
GIB = 2**30
CONNECT_S = 5.0
PINGS = 10
MORE_S = 10.0  # beyond the limit of gloo and NCCL, whose errors say more
PATIENCE_S = 5.0  # network file systems show a new file of another machine only after a while


@dataclass(frozen=True)
class NodeFacts:
    """Software, GPUs and free space of a node."""

    versions: dict[str, str]
    gpu_free: tuple[float, ...]  # share of each GPU's memory
    visible_gpus: int  # those that torch may use
    memory_gib: float  # available
    disk_gib: float  # free where the run is written to
    temp_gib: float  # free in the temporary folder
    shm_gib: float  # free in /dev/shm, which loaders and NCCL talk through


def inspect_node(folder: str | None) -> NodeFacts:
    """The facts of this node; `folder` is where runs are written to (None: the working folder)."""
    free = [free_gib(path) for path in (folder or ".", tempfile.gettempdir(), "/dev/shm")]
    kind, gpu_free = gpus()
    return NodeFacts({**versions(), GPUS: kind}, gpu_free, torch.cuda.device_count(), memory_gib()[1], *free)


def versions() -> dict[str, str]:
    """Version by name. Ours has a digest of the source files, since two checkouts may have the same number."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or NONE}
    found["nccl"] = ".".join(map(str, nccl.version())) if torch.version.cuda else NONE
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = MISSING
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for folder in OURS for path in (root / folder).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return {**found, "worldloom": f"{found['worldloom']}+{digest.hexdigest()[:8]}"}


def gpus() -> tuple[str, tuple[float, ...]]:
    """What kind of GPUs the machine has, and the free share of each one's memory; none without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.free,memory.total", "--format=csv,noheader,nounits"]
    text = "" if shutil.which(query[0]) is None else subprocess.run(query, capture_output=True, text=True).stdout
    return parse_gpus(text)


def parse_gpus(text: str) -> tuple[str, tuple[float, ...]]:
    """As `gpus`, from a line per GPU: name, driver, free and total memory; other lines are skipped."""
    lines = re.findall(r"^(.+), (.+), (\d+), (\d+)$", text, re.MULTILINE)
    kinds = Counter(f"{name} ({driver})" for name, driver, _, _ in lines)
    kind = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or NONE
    return kind, tuple(int(free) / int(total) for _, _, free, total in lines)


def memory_gib() -> tuple[float, float]:
    """Total and available memory of this process: the machine's, or its container's or job's if that is less."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    cgroup = Path("/proc/self/cgroup")
    lines = cgroup.read_text().splitlines() if cgroup.is_file() else []
    own = [Path("/sys/fs/cgroup") / line[3:].lstrip("/") for line in lines if line.startswith("0::")]  # version 2
    for group in [group for path in own for group in (path, *path.parents)]:  # each may set a limit
        limit, used = group / "memory.max", group / "memory.current"
        if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
            most = int(limit.read_text())
            total, available = min(total, most), min(available, most - int(used.read_text()))
    return total / GIB, available / GIB


def free_gib(folder: str) -> float:
    """Free space of the file system that `folder` is on, or will be on when it is made."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(there for there in (path, *path.parents) if there.exists())).free / GIB


def address(env: Mapping[str, str]) -> str:
    """The IPv4 address at which this node's processes let others find them: that of the interface named for gloo, else
    what the host's name means. Empty if it means nothing."""
    interface = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        addresses = psutil.net_if_addrs().get(interface, [])
        return next((found.address for found in addresses if found.family == socket.AF_INET), "")
    with suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def probe_connectivity(addresses: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
    """`name: why` of every node that cannot be connected to at a port that it chose freely, as gloo and NCCL do."""

    def probe(name: str) -> str:
        try:
            socket.create_connection(addresses[name], timeout=CONNECT_S).close()
        except OSError as error:
            return f"{name}: {error}"
        return ""

    with ThreadPoolExecutor(16) as pool:
        return tuple(filter(None, pool.map(probe, addresses)))


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
    facts: NodeFacts
    paths: tuple[SharedPath, ...]
    unreached: tuple[str, ...]  # `node at address: why` of those that cannot be connected to


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

    deadline, left = time.monotonic() + PATIENCE_S, tuple(nodes)
    while (left := tuple(filter(unread, left))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return SharedPath(url, error, left)


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
