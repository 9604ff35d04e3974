"""How much memory a process holds, and giving back what it has freed."""

import ctypes

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
