"""What one node is: its software, GPUs, memory and disks, and what it sees of what nodes share."""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from torch.cuda import nccl

from configs import storage
from configs.errors import UserError, one_line

PACKAGES = ("torch", "deepspeed", "accelerate", "safetensors", "webdataset", "worldloom")
OURS = ("configs", "model", "data_pipeline", "sampling", "train", "launch")
MISSING, NONE = "missing", "none"
GIB = 2**30
CONNECT_S = 5.0
PATIENCE_S = 5.0  # network file systems show a new file of another machine only after a while


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi shows it."""

    name: str
    memory_gib: float
    free_gib: float
    driver: str


@dataclass(frozen=True)
class NodeFacts:
    """Software, GPUs, memory and free space of a node."""

    versions: dict[str, str]
    gpus: tuple[Gpu, ...]  # of the machine
    visible_gpus: int  # those that torch may use
    cores: int
    available_gib: float  # memory
    disk_gib: float  # free where the run is written to
    temp_gib: float  # free in the temporary folder
    shm_gib: float  # free in /dev/shm, which loaders and NCCL talk through


def inspect_node(folder: str | None) -> NodeFacts:
    """The facts of this node; `folder` is where runs are written to (none: the working folder)."""
    free = [free_gib(path) for path in (folder or ".", tempfile.gettempdir(), "/dev/shm")]
    cores = len(os.sched_getaffinity(0))
    return NodeFacts(versions(), gpus(), torch.cuda.device_count(), cores, memory_gib()[1], *free)


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


def gpus() -> tuple[Gpu, ...]:
    """All GPUs of the machine, none where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]) is None:
        return ()
    return parse_gpus(subprocess.run(query, capture_output=True, text=True).stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """One GPU per line of name, total and free memory in MiB, driver; other lines are skipped."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[1].isdigit() and row[2].isdigit()]
    return tuple(Gpu(name, int(total) / 1024, int(free) / 1024, driver) for name, total, free, driver in rows)


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
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / GIB


def address(env: Mapping[str, str]) -> str:
    """The IPv4 address at which this node's processes let others find them: that of the interface which is named for
    gloo, else what the host's name means. Empty if it means nothing."""
    interface = env.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        addresses = psutil.net_if_addrs().get(interface, [])
        return next((found.address for found in addresses if found.family == socket.AF_INET), "")
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def probe_connectivity(addresses: Mapping[int, tuple[str, int]]) -> dict[str, str]:
    """Why a node cannot be connected to at a port that it chose freely, as gloo and NCCL do; by its number as text."""

    def probe(where: tuple[str, int]) -> str:
        try:
            socket.create_connection(where, timeout=CONNECT_S).close()
        except OSError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(16) as pool:
        errors = zip(addresses, pool.map(probe, addresses.values()), strict=True)
        return {str(node): error for node, error in errors if error}


@dataclass(frozen=True)
class SharedPath:
    """A folder or bucket as one node sees it."""

    url: str
    error: str = ""  # why this node cannot write there
    unread: tuple[int, ...] = ()  # nodes whose file this one cannot read


def probe_file(url: str, token: str) -> str:
    """The file that a node writes to a shared folder or bucket."""
    return storage.join(url, f".doctor_{token}")


def probe_path(url: str, node: int, tokens: Mapping[int, str]) -> SharedPath:
    """Writes this node's file and reads those of all nodes, which are named by their tokens."""
    error = ""
    try:
        if not storage.is_s3(url) and not Path(url).is_dir():
            raise UserError("there is no such folder")
        storage.write_text(probe_file(url, tokens[node]), tokens[node])
    except (OSError, ValueError) as problem:
        error = one_line(problem)

    def unread(other: int) -> bool:
        with suppress(OSError):
            return storage.read_bytes(probe_file(url, tokens[other])) != tokens[other].encode()
        return True

    deadline, left = time.monotonic() + PATIENCE_S, tuple(tokens)
    while (left := tuple(other for other in left if unread(other))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return SharedPath(url, error, left)
