"""The shards of a plan as jobs: which are there, which are faulty, and in which order a worker makes them."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from configs import storage
from data_pipeline.clips import BadEpisodeError
from data_pipeline.plan import SHARD, EncodeConfig, Plan, count_clips, describe_fault
from data_pipeline.shards import Index, read_index
from data_pipeline.types import Episode
from data_pipeline.verify import FAULT, require_clips

T = TypeVar("T")


@dataclass(frozen=True)
class ShardJob:
    """A shard of a plan, to be made unless it is there."""

    config: EncodeConfig
    url: str
    episodes: tuple[Episode, ...]
    left_out: dict[str, str] = field(default_factory=dict)  # episodes that could not be decoded, and why

    @property
    def clips(self) -> int:
        return count_clips(self.config, self.episodes)

    def without(self, bad: BadEpisodeError) -> "ShardJob":
        """The same shard as if the episode had not been planned."""
        rest = tuple(episode for episode in self.episodes if episode.id != bad.episode)
        return replace(self, episodes=rest, left_out={**self.left_out, bad.episode: describe_fault(self.config, bad)})

    def read_index(self) -> Index | None:
        """The shard's index if both are there, the shard in full length; its bytes are not compared.

        A shard that leaves episodes out does not count for a worker that is to stop at them.
        """
        try:
            index = read_index(self.url)
            whole = not index.info.clips or storage.size(self.url) == index.info.bytes
        except FileNotFoundError:
            return None
        return None if not whole or (index.left_out and self.config.on_bad_recording == "stop") else index

    def find_fault(self) -> str | None:
        """Why the shard is to be made again, in a few words, or None. Reads all of it."""
        try:
            info, entries, left_out = read_index(self.url)
            if left_out:  # the recording may have been mended
                return f"made without {', '.join(left_out)}, tried again"
            if info.url != storage.name_of(self.url) or len(entries) != self.clips:
                return "its index is of another shard"
            require_clips(self.url, info, entries, shapes={})
        except FAULT as error:
            return str(error)
        return None


def list_jobs(config: EncodeConfig, plan: Plan) -> list[ShardJob]:
    """The shards that the plan wants."""
    return [
        ShardJob(config, storage.join(plan.folder, SHARD.format(i)), episodes) for i, episodes in enumerate(plan.shards)
    ]


def sort_jobs(jobs: Sequence[T]) -> list[T]:
    """This worker's share, then the others' in random order, so that two workers that help out seldom choose the same
    job. A worker that no launcher has numbered has all jobs for its share."""
    rank, world = from_launcher("RANK", 0), from_launcher("WORLD_SIZE", 1)
    others = [job for i, job in enumerate(jobs) if i % world != rank]
    return [*jobs[rank::world], *random.sample(others, len(others))]


def from_launcher(name: str, alone: int) -> int:
    """The variable that a launcher such as `accelerate launch` sets for this process, or `alone`."""
    return int(os.environ.get(name, alone))
