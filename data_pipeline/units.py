"""What workers share out among themselves: a shard that is to be there, and whether it is."""

from dataclasses import dataclass, field, replace

from configs import storage
from data_pipeline.clips import BadEpisodeError
from data_pipeline.plan import SHARD, EncodeConfig, Plan, count_clips, tell_why
from data_pipeline.shards import Index, read_index
from data_pipeline.types import Episode


@dataclass(frozen=True)
class Unit:
    """A shard that is to be there."""

    config: EncodeConfig
    folder: str
    name: str
    key: str  # of its claim
    episodes: tuple[Episode, ...]
    left_out: dict[str, str] = field(default_factory=dict)  # those that turned out not to be decodable, and why

    @property
    def url(self) -> str:
        return storage.join(self.folder, self.name)

    @property
    def clips(self) -> int:
        return count_clips(self.config, self.episodes)

    def without(self, bad: BadEpisodeError) -> "Unit":
        """The same shard as if the episode had not been planned: what is in it depends on nothing else."""
        rest = tuple(episode for episode in self.episodes if episode.id != bad.episode)
        return replace(self, episodes=rest, left_out={**self.left_out, bad.episode: tell_why(self.config, bad)})

    def complete(self) -> Index | None:
        """Its index if shard and index are there in full length; their bytes are `verify`'s business.

        One that leaves episodes out is not complete to a worker that is to stop at them.
        """
        try:
            index = read_index(self.url)
            stops = index.left_out and self.config.on_bad_recording == "stop"
            whole = not index.info.clips or storage.size(self.url) == index.info.bytes
            return index if whole and not stops else None
        except FileNotFoundError:
            return None


def list_units(config: EncodeConfig, plan: Plan) -> list[Unit]:
    """The shards that the plan wants."""
    folder, names = storage.join(config.out, plan.split), [SHARD.format(i) for i in range(len(plan.shards))]
    return [
        Unit(config, folder, name, f"{plan.split}-{name.removesuffix('.tar')}", episodes)
        for name, episodes in zip(names, plan.shards, strict=True)
    ]
