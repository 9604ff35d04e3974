"""What an `encode` run is told, and its plan: which clips of which episodes go into which shard."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from configs import to_dict
from data_pipeline import storage
from data_pipeline.readers import Reader, find_recordings, split_episodes
from data_pipeline.shards import INDEX, clip_key
from data_pipeline.types import CHUNK_FRAMES, Episode, GameConfig, Layout, Manifest, ShardInfo
from model.codec import TEMPORAL, Codec, codec_hash
from model.conditioning import Unknown
from model.vision import Vision, vision_hash

PLAN, SHARD = "plan.json", "shard-{:06d}.tar"


@dataclass(frozen=True)
class EncodeConfig:
    """`python -m data_pipeline encode`."""

    game: GameConfig
    source: str  # folder of recordings
    codec: str  # folder of the codec
    out: str  # gets train/ and heldout/, each with shards and a manifest
    reader: Reader = "worldloom"  # format of the recordings
    layout: Layout = "chunked"
    clip_frames: int = 18
    stride: int = 9  # frames between the starts of two clips
    shard_clips: int = 100  # a shard is closed after the episode that reaches this
    heldout_every: int = 10  # every n-th episode is held out; 0 holds out nothing
    vision: Vision = "none"  # CLIP tokens of each clip's first frame, for a model with that model.vision
    vision_weights: str | None = None  # of CLIP's vision tower
    unknown: Unknown = "zeros"  # grey: each clip carries its first frame's conditioning as the released models have it
    # Runs of frames, of all episodes of a shard, that the codec encodes at once. Few, so that the next ones are decoded
    # meanwhile; and tensors above 32 MB are given back to the system after every use (glibc), which cost as much time
    # as the encoding. It is part of the plan: in another batch, a product may round its last bit differently.
    batch: int = 4
    device: Literal["auto", "cpu"] = "auto"  # auto: this process's GPU if there is one
    # A worker on another machine that has not renewed its claim for so long is taken for dead, and its shard made anew.
    stale_s: float = 60.0

    def __post_init__(self) -> None:
        if self.layout == "chunked" and self.clip_frames % CHUNK_FRAMES:
            raise ValueError(f"clip_frames={self.clip_frames}: chunked clips are multiples of {CHUNK_FRAMES} frames")
        if self.layout == "continuous" and self.clip_frames % TEMPORAL != 1:
            raise ValueError(f"clip_frames={self.clip_frames}: continuous clips have 1 + {TEMPORAL}k frames")
        if (self.vision == "none") != (self.vision_weights is None):
            raise ValueError(f"vision={self.vision} and vision_weights={self.vision_weights}: give both or neither")
        if self.unknown == "grey" and self.layout != "continuous":
            raise ValueError("unknown=grey is how a causal model is conditioned; it needs layout=continuous")
        for name in ("clip_frames", "stride", "shard_clips", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.stale_s <= 0:
            raise ValueError(f"stale_s={self.stale_s} must be positive")

    @property
    def run_frames(self) -> int:
        """Frames that the codec encodes in one go: a chunk, or the whole clip."""
        return CHUNK_FRAMES if self.layout == "chunked" else self.clip_frames


@dataclass(frozen=True)
class Plan:
    """What goes into one shard set; a function of the config and the recordings' actions alone."""

    split: str
    facts: dict[str, Any]  # everything that decides what is in the shards; its hash is the manifest's plan_hash
    shards: tuple[tuple[Episode, ...], ...]  # the episodes of each, in order

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]


def make_plans(config: EncodeConfig, codec: Codec) -> list[Plan]:
    """The plan of each split: which episodes go into which shard. Reads every recording's actions, no frames."""
    recordings = find_recordings(config.reader, config.source)
    train, heldout = split_episodes(recordings, config.heldout_every)
    if config.heldout_every and not heldout:
        raise ValueError(
            f"{len(recordings)} recordings hold out none with heldout_every={config.heldout_every}; "
            "record more or set it smaller (0 holds out nothing)"
        )
    plans = []
    with tqdm(total=len(recordings), desc="check recordings", unit="recording", disable=None) as bar:
        for split, part in [("train", train), ("heldout", heldout)] if heldout else [("train", train)]:
            episodes = []
            for recording in part:
                episodes += recording.read(config.game)
                bar.update()
            plans.append(_make_plan(config, codec, split, episodes))
    return plans


def _make_plan(config: EncodeConfig, codec: Codec, split: str, episodes: Sequence[Episode]) -> Plan:
    shards, group = [], []
    for episode in episodes:
        group += [episode] if clip_starts(config, len(episode.actions)) else []
        if count_clips(config, group) >= config.shard_clips:
            shards, group = [*shards, tuple(group)], []
    shards += [tuple(group)] if group else []
    if not shards:
        raise ValueError(f"none of the {len(episodes)} {split} episodes has the {config.clip_frames} frames of a clip")
    _require_distinct_keys(shards)
    no_facts = ("source", "out", "vision_weights", "device", "stale_s")
    settings = {name: value for name, value in to_dict(config).items() if name not in no_facts}
    facts = {
        **settings,
        "codec": codec.config.name,
        "codec_hash": codec_hash(storage.local(config.codec)),
        "vision_hash": vision_hash(storage.local(config.vision_weights)) if config.vision_weights else None,
        "split": split,
        "episodes": {episode.id: _fingerprint(episode) for episode in episodes},
    }
    return Plan(split, facts, tuple(shards))


def clip_starts(config: EncodeConfig, frames: int) -> range:
    return range(0, frames - config.clip_frames + 1, config.stride)


def count_clips(config: EncodeConfig, episodes: Sequence[Episode]) -> int:
    return sum(len(clip_starts(config, len(episode.actions))) for episode in episodes)


def _fingerprint(episode: Episode) -> str:
    """Frames and a hash of the actions: tells a recording that was made anew from the one that was encoded.

    It does not tell a video that was encoded anew: to plan, no picture is read.
    """
    digest = hashlib.sha256(episode.actions.keyboard.tobytes() + episode.actions.mouse.tobytes())
    return f"{len(episode.actions)} frames {digest.hexdigest()[:12]}"


def _require_distinct_keys(shards: Sequence[Sequence[Episode]]) -> None:
    seen: dict[str, str] = {}
    for episode in (episode for shard in shards for episode in shard):
        other = seen.setdefault(clip_key(episode.id, 0), episode.id)
        if other != episode.id:
            raise ValueError(f"episodes {other!r} and {episode.id!r} have the same name in a shard; rename one")


def require_same_plan(plan: Plan, folder: str) -> None:
    """Raises ValueError in one line if the folder holds another plan, or shards and nothing that says of which one."""
    url = storage.join(folder, PLAN)
    if not storage.exists(url):
        if not any(name.endswith(INDEX) for name in storage.list_files(folder)):
            return
        if not storage.exists(url):  # even now: a worker that has just begun writes its plan before its first shard
            raise ValueError(f"{folder} holds shards without their {PLAN}; delete them or give another out=")
    try:
        found = dict(json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{url} is no plan ({error}); delete {folder} or give another out=") from error
    for name in plan.facts:
        if found.get(name) != plan.facts[name]:
            change = _name_change(found.get(name), plan.facts[name])
            raise ValueError(f"{folder} holds shards of another plan: {name} {change}; give another out= or delete it")


def _name_change(old: Any, new: Any) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"was {old!r}, is {new!r}"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} {_name_change(old.get(names[0]), new.get(names[0]))}{more}"


def describe_set(config: EncodeConfig, codec: Codec, plan: Plan, shards: Sequence[ShardInfo]) -> Manifest:
    per_run = 1 + (config.run_frames - 1) // TEMPORAL
    return Manifest(
        game=config.game,
        layout=config.layout,
        clip_frames=config.clip_frames,
        clip_latents=config.clip_frames // config.run_frames * per_run,
        latent_channels=codec.config.channels,
        codec=plan.facts["codec"],
        codec_hash=plan.facts["codec_hash"],
        latent_mean=tuple(codec.latent_mean.tolist()),
        latent_std=tuple(codec.latent_std.tolist()),
        plan_hash=plan.hash,
        split=plan.split,
        vision=config.vision,
        unknown=config.unknown,
        shards=tuple(shards),
    )
