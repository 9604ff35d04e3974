"""In which order the clips come: a function of (seed, epoch), over one set or several with weights."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Epoch(NamedTuple):
    """One epoch's order."""

    clips: np.ndarray  # (n) numbers of clips, counted over all sets
    groups: np.ndarray  # (n) which group of shards each comes from, never falling


class Order:
    """The clips of every epoch.

    Each set gives its number of clips times its weight per epoch, rounded: with weight 1 every clip once, with 2 every
    clip twice, with 0.5 every clip once in two epochs. They are shuffled over everything; or with `shuffle_shards` the
    shards are shuffled, dealt into groups of that many, and the clips shuffled within each group, so that a reader of
    shards on a server needs only two groups at a time.
    """

    def __init__(
        self, shards: Sequence[Sequence[int]], weights: Sequence[float], seed: int, shuffle_shards: int = 0
    ) -> None:
        """`shards`: for every set, how many clips each of its shards has."""
        self.seed, self.shuffle_shards = seed, shuffle_shards
        sizes = [sum(counts) for counts in shards]
        self._sets = list(zip(sizes, np.cumsum([0, *sizes[:-1]]).tolist(), weights, strict=True))
        self._shard_of = np.repeat(np.arange(sum(map(len, shards))), [count for counts in shards for count in counts])
        self.clips_per_set = [round(size * weight) for size, _, weight in self._sets]
        self.clips_per_epoch = sum(self.clips_per_set)
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def clip(self, sample: int) -> int:
        """Which clip is sample `sample` of the run."""
        epoch, place = divmod(sample, self.clips_per_epoch)
        return int(self.epoch(epoch).clips[place])

    def group(self, sample: int) -> tuple[int, int]:
        """Epoch and group that sample `sample` of the run comes from."""
        epoch, place = divmod(sample, self.clips_per_epoch)
        return epoch, int(self.epoch(epoch).groups[place])

    def shards_after(self, epoch: int, group: int, batch: int, rank: int, world: int) -> list[int]:
        """The shards that the rank needs in the group after this one, in the order of their first use by it."""
        end = int(np.searchsorted(self.epoch(epoch).groups, group, side="right"))
        epoch, group = self.group(epoch * self.clips_per_epoch + end)  # the next epoch's first, after the last
        clips, groups = self.epoch(epoch)
        places = np.flatnonzero(groups == group)
        mine = (epoch * self.clips_per_epoch + places) // batch % world == rank
        return list(dict.fromkeys(self._shard_of[clips[places[mine]]].tolist()))

    def _epoch(self, epoch: int) -> Epoch:
        clips = np.concatenate([self._clips_of_set(i, epoch) for i in range(len(self._sets))])
        words = random_words(len(clips), self.seed, epoch)
        if not self.shuffle_shards:
            return Epoch(clips[np.argsort(words, kind="stable")], np.zeros(len(clips), np.int64))
        places = np.empty(self._shard_of.max() + 1, np.int64)
        places[shuffled(len(places), self.seed, epoch, SHARDS)] = np.arange(len(places))
        groups = places[self._shard_of[clips]] // self.shuffle_shards
        order = np.lexsort((words, groups))
        return Epoch(clips[order], groups[order])

    def _clips_of_set(self, i: int, epoch: int) -> np.ndarray:
        """The clips that set `i` gives to an epoch: the next ones of its own endless order."""
        size, first, weight = self._sets[i]
        if weight == 1:
            return first + np.arange(size)
        count = self.clips_per_set[i]
        rounds = range(epoch * count // size, -(-(epoch + 1) * count // size))
        whole = [shuffled(size, self.seed, number, i + 1 + SHARDS) for number in rounds]
        skipped = epoch * count - rounds.start * size
        return first + np.concatenate([*whole, np.empty(0, np.int64)])[skipped : skipped + count]


SHARDS = 1  # the shuffle of the shards; those of weighted sets follow it, that of the clips has no number


def random_words(n: int, *key: int) -> np.ndarray:
    """(n) uint64, a function of the numbers in `key`.

    Raw words of a bit generator, which NumPy promises for good, but not what Generator.permutation gives.
    """
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)


def shuffled(n: int, *key: int) -> np.ndarray:
    """The numbers 0 ... n - 1 in an order that is a function of the numbers in `key`."""
    return np.argsort(random_words(n, *key), kind="stable")
