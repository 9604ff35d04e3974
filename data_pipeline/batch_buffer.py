"""The memory of a batch, which clips are read into one by one."""

import math

import numpy as np
import torch

from configs.errors import UserError

TensorLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # a clip's tensors in the order of their bytes


class BatchBuffer:
    """Memory for `b` clips of one layout, that of the clip which is read first."""

    def __init__(self, b: int, pin_memory: bool = False) -> None:
        self.b, self.pin_memory = b, pin_memory
        self.layout: TensorLayout = {}
        self._bytes: dict[str, torch.Tensor] = {}  # (b size) uint8
        self._arrays: dict[str, np.ndarray] = {}  # the same memory

    def row(self, i: int, layout: TensorLayout, clip: str) -> dict[str, memoryview]:
        """The bytes of row `i` by tensor. Raises UserError, naming `clip`, for another layout than the first clip's."""
        if not self.layout:
            self.layout = layout
            sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.items()}
            self._bytes = {name: self._allocate(size) for name, size in sizes.items()}
            self._arrays = {name: tensor.numpy() for name, tensor in self._bytes.items()}
        if layout != self.layout:
            raise UserError(f"{clip} has {layout}, others {self.layout}; encode them alike")
        return {name: array[i].data for name, array in self._arrays.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """(b ...) by name."""
        return {
            name: self._bytes[name].view(dtype).view(self.b, *shape)
            if math.prod(shape)
            else torch.empty(self.b, *shape, dtype=dtype)  # such as the mouse of a game without one
            for name, (dtype, shape) in self.layout.items()
        }

    def _allocate(self, size: int) -> torch.Tensor:
        if self.pin_memory:  # torch uses it again, but not before copies from it to a GPU have ended
            return torch.empty(self.b, size, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty((self.b, size), np.uint8))  # NumPy asks for large pages, torch does not
