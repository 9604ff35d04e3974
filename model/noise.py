"""Noise that depends on seeds alone: the same on every machine, for every batch size and number of processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on every number of `key`; neighbouring keys give unrelated numbers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def seeded_noise(shape: Sequence[int], seeds: Sequence[int], *key: int) -> Tensor:
    """Noise (b *shape) float32 on the CPU; each sample depends on its own seed and `key`, not on the others."""
    return torch.stack([torch.randn(*shape, generator=seeded_generator(seed, *key)) for seed in seeds])
