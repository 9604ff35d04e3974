"""What one node is: its software, GPUs, memory and disks. Nothing here needs another node."""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from torch.cuda import nccl

PACKAGES = ("torch", "deepspeed", "accelerate", "safetensors", "webdataset")
OURS = ("configs", "model", "data_pipeline", "sampling", "train", "launch")
MISSING, NONE = "missing", "none"
GIB = 2**30


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
    seen_gpus: int  # those that torch may use
    cores: int
    memory_gib: float  # what this process may use in all
    available_gib: float  # of that, what nobody holds
    disk_gib: float  # free where the run is written to
    temp_gib: float  # free in the temporary folder
    shm_gib: float  # free in /dev/shm, which loaders and NCCL talk through


def inspect_node(folder: str | None) -> NodeFacts:
    """The facts of this node; `folder` is where runs are written to (none: the working folder)."""
    total, available = memory_gib()
    return NodeFacts(
        versions=versions(),
        gpus=gpus(),
        seen_gpus=torch.cuda.device_count(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=total,
        available_gib=available,
        disk_gib=free_gib(folder or "."),
        temp_gib=free_gib(tempfile.gettempdir()),
        shm_gib=free_gib("/dev/shm"),
    )


def versions() -> dict[str, str]:
    """Version by name. Ours has a digest of the source files, since two checkouts may bear the same number."""
    nccl_version = ".".join(map(str, nccl.version())) if torch.version.cuda else NONE
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or NONE, "nccl": nccl_version}
    return {**found, **{name: _version(name) for name in PACKAGES}, "worldloom": f"{_version('worldloom')}+{digest()}"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return MISSING


def digest() -> str:
    """Of all source files of ours."""
    root, found = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(path for folder in OURS for path in (root / folder).rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:8]


def gpus() -> tuple[Gpu, ...]:
    """All GPUs of the machine, none where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]) is None:
        return ()
    return parse_gpus(subprocess.run(query, capture_output=True, text=True).stdout)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """One GPU per line of name, total and free memory in MiB, driver; lines that say something else are no GPU."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[1].isdigit() and row[2].isdigit()]
    return tuple(Gpu(name, int(total) / 1024, int(free) / 1024, driver) for name, total, free, driver in rows)


def memory_gib() -> tuple[float, float]:
    """Total and available memory of this process: the machine's, or its container's or job's if that is less."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for group in _control_groups():
        limit, held = group / "memory.max", group / "memory.current"
        if limit.is_file() and held.is_file() and limit.read_text().strip() != "max":
            most = int(limit.read_text())
            total, available = min(total, most), min(available, most - int(held.read_text()))
    return total / GIB, available / GIB


def _control_groups() -> list[Path]:
    """The control group (version 2) of this process and those around it, each of which may set a limit."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").is_file() else []
    own = [Path("/sys/fs/cgroup") / line[3:].lstrip("/") for line in lines if line.startswith("0::")]
    return [group for path in own for group in (path, *path.parents) if group.is_relative_to("/sys/fs/cgroup")]


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
        found = psutil.net_if_addrs().get(interface, [])
        return next((one.address for one in found if one.family == socket.AF_INET), "")
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
