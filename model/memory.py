"""How much memory a process holds, now and at its peak."""

import ctypes
import resource
from pathlib import Path

import psutil
import torch


def memory_gib() -> float:
    """CUDA: the most that torch has held; else what the process holds."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def give_back() -> None:
    """Returns to the system what this process has freed: glibc keeps it, in pieces of less than 32 MB, for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in other C libraries
    if trim is not None:
        trim(0)


def peak_gib(device: str) -> float:
    """The peak of memory in GiB. CPU: resident memory of the process; CUDA: allocated by torch."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)  # kB
    return (int(peak) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
