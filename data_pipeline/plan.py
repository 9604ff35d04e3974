"""What an `encode` run is told, and its plan: which clips of which episodes go into which shard."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tqdm import tqdm

from configs import storage, to_dict
from configs.errors import UserError, one_line
from configs.foreign import parse_object
from configs.game import GameConfig
from data_pipeline.left_out import LeftOut
from data_pipeline.readers import Reader, Recording, count_cut, describe_crop, find_recordings, split_episodes
from data_pipeline.readers.recording import BAD_RECORDING, say
from data_pipeline.shards import INDEX, clip_key, clip_latents
from data_pipeline.types import Episode, Manifest, ShardInfo
from model.codec import Codec, codec_hash
from model.layout import CHUNK_FRAMES, CondFill, Layout
from model.patch_codec import TEMPORAL
from model.vision import Vision, vision_hash

PLAN, SHARD = "plan.json", "shard-{:06d}.tar"
NO_FACTS = ("source", "out", "vision_weights", "device", "stale_s", "on_bad_recording")  # change no byte of a shard
# What still is a clip, a shard, a batch, a pause; more is a slip of the hand.
LARGEST = {"clip_frames": 10_000, "stride": 1_000_000, "shard_clips": 1_000_000, "batch": 10_000}
LONGEST_STALE_S = 7 * 24 * 3600.0
SAID = 60  # letters of a fact of another plan


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
    unknown: CondFill = "zeros"  # grey: each clip carries its first frame's conditioning as the released models have it
    # Runs of frames, of all episodes of a shard, that the codec encodes at once. Few, so that the next ones are decoded
    # meanwhile; and tensors above 32 MB are given back to the system after every use (glibc), which cost as much time
    # as the encoding. It is part of the plan: in another batch, a product may round its last bit differently.
    batch: int = 4
    device: Literal["auto", "cpu"] = "auto"  # auto: this process's GPU if there is one
    # A worker on another machine that has not renewed its claim for so long is taken for dead, and its shard made anew.
    stale_s: float = 60.0
    on_bad_recording: Literal["stop", "skip"] = "stop"  # skip: what cannot be read or decoded is left out and listed

    def __post_init__(self) -> None:
        if self.layout == "chunked" and self.clip_frames % CHUNK_FRAMES:
            raise UserError(f"clip_frames={self.clip_frames}: chunked clips are multiples of {CHUNK_FRAMES} frames")
        if self.layout == "continuous" and self.clip_frames % TEMPORAL != 1:
            raise UserError(f"clip_frames={self.clip_frames}: continuous clips have 1 + {TEMPORAL}k frames")
        if (self.vision == "none") != (self.vision_weights is None):
            raise UserError(f"vision={self.vision} and vision_weights={self.vision_weights}: give both or neither")
        if self.unknown == "grey" and self.layout != "continuous":
            raise UserError("unknown=grey is how a causal model is conditioned; it needs layout=continuous")
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise UserError(f"{name}={getattr(self, name)} must be from 1 to {largest}")
        if not 0 < self.stale_s <= LONGEST_STALE_S:
            raise UserError(f"stale_s={self.stale_s} must be positive, and at most {LONGEST_STALE_S:g}")

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
    left_out: LeftOut  # before any frame is decoded

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Readings:
    """What the recordings of a split gave."""

    episodes: list[Episode]
    bad: dict[str, str]  # recordings that cannot be read, and why
    empty: list[str]
    cut_frames: int


def make_plans(config: EncodeConfig, codec: Codec) -> list[Plan]:
    """The plan of each split: which episodes go into which shard. Reads every recording's actions, no frames.

    Recordings are held out by their place among all that are there, bad ones too: a bad one moves no other.
    """
    recordings = find_recordings(config.reader, config.source)
    train, heldout = split_episodes(recordings, config.heldout_every)
    if config.heldout_every and not heldout:
        raise UserError(
            f"{len(recordings)} recordings hold out none with heldout_every={config.heldout_every}; "
            "record more or set it smaller (0 holds out nothing)"
        )
    plans = []
    with tqdm(total=len(recordings), desc="check recordings", unit="recording", disable=None) as bar:
        for split, part in [("train", train), ("heldout", heldout)] if heldout else [("train", train)]:
            plans.append(_make_plan(config, codec, split, _read_all(config, part, bar)))
    crop = describe_crop([one for plan in plans for shard in plan.shards for one in shard], config.game)
    if crop:
        say(crop)
    return plans


def _read_all(config: EncodeConfig, recordings: Sequence[Recording], bar: tqdm) -> Readings:
    found, bad, empty, cut = [], {}, [], 0
    for recording in recordings:
        try:
            episodes = recording.read(config.game)
            found += episodes
            empty += [] if episodes else [recording.name]
            cut += count_cut(episodes)
        except BAD_RECORDING as error:
            if config.on_bad_recording == "stop":
                raise
            bad[recording.name] = tell_why(config, error)
        bar.update()
    return Readings(found, bad, empty, cut)


def tell_why(config: EncodeConfig, error: Exception) -> str:
    """What is wrong with a recording, in one line that is the same wherever the source lies."""
    return one_line(error).replace(str(config.source).rstrip("/") + "/", "")


def _make_plan(config: EncodeConfig, codec: Codec, split: str, readings: Readings) -> Plan:
    shards, group, episodes = [], [], readings.episodes
    for episode in episodes:
        group += [episode] if clip_starts(config, len(episode.actions)) else []
        if count_clips(config, group) >= config.shard_clips:
            shards, group = [*shards, tuple(group)], []
    shards += [tuple(group)] if group else []
    if not shards:
        also = "".join(f"; {name} cannot be read: {why}" for name, why in [*readings.bad.items()][:1])
        raise UserError(
            f"none of the {len(episodes)} {split} episodes has the {config.clip_frames} frames of a clip{also}"
        )
    _require_distinct_keys(shards)
    settings = {name: value for name, value in to_dict(config).items() if name not in NO_FACTS}
    facts = {
        **settings,
        "codec": codec.config.name,
        "codec_hash": codec_hash(config.codec),
        "vision_hash": vision_hash(config.vision_weights) if config.vision_weights else None,
        "split": split,
        "episodes": {episode.id: _fingerprint(episode) for episode in episodes},
    }
    return Plan(split, facts, tuple(shards), _count_left_out(config, readings))


def _count_left_out(config: EncodeConfig, readings: Readings) -> LeftOut:
    lengths = {episode.id: len(episode.actions) for episode in readings.episodes}
    return LeftOut(
        episodes=len(lengths),
        clip_frames=config.clip_frames,
        bad_recordings=readings.bad,
        empty_recordings=readings.empty,
        short_episodes={name: frames for name, frames in lengths.items() if not clip_starts(config, frames)},
        other_frames=sum(frames_in_no_clip(config, frames) for frames in lengths.values()),
        cut_frames=readings.cut_frames,
    )


def without_bad(config: EncodeConfig, plan: Plan, bad: Mapping[str, str]) -> LeftOut:
    """What a set leaves out if the plan's episodes `bad`, by their ids, turned out not to be decodable, and why."""
    planned = plan.left_out
    lengths = [len(episode.actions) for shard in plan.shards for episode in shard if episode.id in bad]
    other_frames = planned.other_frames - sum(frames_in_no_clip(config, frames) for frames in lengths)
    return replace(planned, bad_recordings={**planned.bad_recordings, **bad}, other_frames=other_frames)


def frames_in_no_clip(config: EncodeConfig, frames: int) -> int:
    """Frames that are in no clip of an episode of so many, if it has any."""
    clips = len(clip_starts(config, frames))
    return frames - config.clip_frames - (clips - 1) * min(config.stride, config.clip_frames) if clips else 0


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
            raise UserError(f"episodes {other!r} and {episode.id!r} have the same name in a shard; rename one")


def require_same_plan(plan: Plan, folder: str) -> None:
    """Raises ValueError in one line if the folder holds another plan, or shards and nothing that says of which one."""
    url = storage.join(folder, PLAN)
    if not storage.exists(url):
        if not any(name.endswith(INDEX) for name in storage.list_files(folder)):
            return
        if not storage.exists(url):  # even now: a worker that has just begun writes its plan before its first shard
            raise UserError(f"{folder} holds shards without their {PLAN}; delete them or give another out=")
    try:
        found = parse_object(storage.read_bytes(url), url)
    except ValueError as error:
        raise UserError(f"{error}; it is no plan: delete {folder} or give another out=") from error
    for name in plan.facts:
        if found.get(name) != plan.facts[name]:
            change = _name_change(found.get(name), plan.facts[name])
            raise UserError(f"{folder} holds shards of another plan: {name} {change}; give another out= or delete it")


def _name_change(old: Any, new: Any) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"was {old!r:.{SAID}}, is {new!r:.{SAID}}"
    names = [name for name in {**old, **new} if (name in old, old.get(name)) != (name in new, new.get(name))]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} {_name_change(old.get(names[0]), new.get(names[0]))}{more}"


def describe_set(config: EncodeConfig, codec: Codec, plan: Plan, shards: Sequence[ShardInfo]) -> Manifest:
    return Manifest(
        game=config.game,
        layout=config.layout,
        clip_frames=config.clip_frames,
        clip_latents=clip_latents(config.layout, config.clip_frames),
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
