"""The memory that batches lie in: used again when nobody looks at it any more, and filled clip by clip."""

import math
import mmap
import weakref
from collections import defaultdict
from contextlib import suppress

import numpy as np
import torch

from data_pipeline.shards import ALIGNMENT, Layout

LARGE_PAGE = 1 << 21  # bytes


class Memory:
    """Memory of batches that nobody looks at any more, for the next ones: to ask the system for it anew, page by page,
    takes as long as the reading."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, b: int, size: int) -> np.ndarray:
        """(b size) bytes, not yet filled; they come back when no tensor, and no view of one, lies in them any more."""
        free = self._free[b * size]
        memory = free.pop() if free else allocate(b * size)
        seen = memory.reshape(b, size)
        weakref.finalize(seen, free.append, memory)
        return seen


class Filling:
    """A batch that is being filled, row by row, with clips of one layout."""

    def __init__(self, layout: Layout, b: int, memory: Memory) -> None:
        self.layout, self.b = layout, b
        self.bytes = {
            name: memory.take(b, math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in layout.items()
        }

    def row(self, i: int) -> dict[str, memoryview]:
        """The bytes of row `i` by tensor."""
        return {name: rows[i].data for name, rows in self.bytes.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """(b ...) by name."""
        return {
            name: torch.from_numpy(self.bytes[name]).view(dtype).view(self.b, *shape)
            if math.prod(shape)
            else torch.empty(self.b, *shape, dtype=dtype)  # what a game has nothing of, such as a mouse
            for name, (dtype, shape) in self.layout.items()
        }


def allocate(size: int) -> np.ndarray:
    """(size) bytes from a multiple of 64 on, in large pages where the system has them: both make filling faster."""
    boundary = LARGE_PAGE if size >= LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE") else ALIGNMENT
    if boundary == LARGE_PAGE:
        area = mmap.mmap(-1, size + boundary, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(area, np.uint8)
    else:
        memory = np.empty(size + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    return memory[start : start + size]
