"""The settings of `encode`, and its plan: which clips of which episodes go into which shard."""

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
from data_pipeline.shards import INDEX, clip_key, count_latents
from data_pipeline.types import Episode, Manifest, ShardInfo
from model.codec import Codec, codec_hash
from model.config import Vision
from model.layout import CHUNK_FRAMES, CHUNK_LATENTS, CondFill, Layout
from model.vision import vision_hash

PLAN, SHARD = "plan.json", "shard-{:06d}.tar"
NO_FACTS = ("source", "out", "vision_weights", "device", "on_bad_recording")  # change no byte of a shard
LARGEST = {"clip_frames": 10_000, "stride": 1_000_000, "shard_clips": 1_000_000, "batch": 10_000}
SHOWN = 60  # characters of a fact of another plan


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
    # Runs of frames, of all episodes of a shard, that the codec encodes at once. Few: the next ones are decoded
    # meanwhile, and glibc gives tensors above 32 MB back to the system after each use, which took as long as encoding.
    # Part of the plan, since a matrix product may round its last bit differently in another batch.
    batch: int = 4
    device: Literal["auto", "cpu"] = "auto"  # auto: this process's GPU if there is one
    on_bad_recording: Literal["stop", "skip"] = "stop"  # skip: what cannot be read or decoded is left out and listed

    def __post_init__(self) -> None:
        if self.layout == "chunked" and self.clip_frames % CHUNK_FRAMES:
            raise UserError(f"clip_frames={self.clip_frames}: chunked clips are multiples of {CHUNK_FRAMES} frames")
        if (self.vision == "none") != (self.vision_weights is None):
            raise UserError(f"vision={self.vision} and vision_weights={self.vision_weights}: give both or neither")
        if self.unknown == "grey" and self.layout != "continuous":
            raise UserError("unknown=grey is how a causal model is conditioned; it needs layout=continuous")
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise UserError(f"{name}={getattr(self, name)} must be from 1 to {largest}")

    @property
    def run_frames(self) -> int:
        """Frames that the codec encodes at once: a chunk, or the whole clip."""
        return CHUNK_FRAMES if self.layout == "chunked" else self.clip_frames


@dataclass(frozen=True)
class Plan:
    """What goes into one shard set; a function of the config and the recordings' actions alone."""

    split: str
    folder: str  # of the set
    facts: dict[str, Any]  # everything that decides what is in the shards; its hash is the manifest's plan_hash
    shards: tuple[tuple[Episode, ...], ...]  # the episodes of each, in order
    left_out: LeftOut  # before any frame is decoded

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]


def make_plans(config: EncodeConfig, codec: Codec) -> list[Plan]:
    """The plan of each split. Reads every recording's actions, no frames.

    A recording is held out by its position among all recordings, bad ones included, so a bad one moves no other.
    """
    _require_whole_clips(config, codec)
    recordings = find_recordings(config.reader, config.source)
    train, heldout = split_episodes(recordings, config.heldout_every)
    if config.heldout_every and not heldout:
        raise UserError(
            f"{len(recordings)} recordings hold out none with heldout_every={config.heldout_every}; "
            "record more or set it smaller (0 holds out nothing)"
        )
    splits = {"train": train} | ({"heldout": heldout} if heldout else {})
    with tqdm(total=len(recordings), desc="check recordings", unit="recording", disable=None) as bar:
        plans = [_make_plan(config, codec, split, *_read_all(config, part, bar)) for split, part in splits.items()]
    crop = describe_crop([episode for plan in plans for shard in plan.shards for episode in shard], config.game)
    if crop:
        say(crop)
    return plans


def _require_whole_clips(config: EncodeConfig, codec: Codec) -> None:
    temporal, frames = codec.config.temporal, config.clip_frames
    if config.layout == "continuous" and (frames - 1) % temporal:
        raise UserError(f"clip_frames={frames}: continuous clips have 1 + {temporal}k frames")
    if config.layout == "chunked" and 1 + temporal * (CHUNK_LATENTS - 1) != CHUNK_FRAMES:
        raise UserError(f"layout=chunked: {codec.config.name} has {temporal} frames per latent; use layout=continuous")


def _read_all(config: EncodeConfig, recordings: Sequence[Recording], bar: tqdm) -> tuple[list[Episode], LeftOut]:
    episodes, bad, empty, cut = list[Episode](), {}, [], 0
    for recording in recordings:
        try:
            of_recording = recording.read(config.game)
            episodes += of_recording
            empty += [] if of_recording else [recording.name]
            cut += count_cut(of_recording)
        except BAD_RECORDING as error:
            if config.on_bad_recording == "stop":
                raise
            bad[recording.name] = describe_fault(config, error)
        bar.update()
    lengths = {episode.id: len(episode.actions) for episode in episodes}
    left_out = LeftOut(
        episodes=len(lengths),
        clip_frames=config.clip_frames,
        bad_recordings=bad,
        empty_recordings=empty,
        short_episodes={name: frames for name, frames in lengths.items() if not clip_starts(config, frames)},
        other_frames=sum(_count_unused_frames(config, frames) for frames in lengths.values()),
        cut_frames=cut,
    )
    return episodes, left_out


def describe_fault(config: EncodeConfig, error: Exception) -> str:
    """What is wrong with a recording, in one line that does not depend on where the source lies."""
    return one_line(error).replace(str(config.source).rstrip("/") + "/", "")


def _make_plan(config: EncodeConfig, codec: Codec, split: str, episodes: list[Episode], left_out: LeftOut) -> Plan:
    shards, group = list[tuple[Episode, ...]](), list[Episode]()
    for episode in episodes:
        group += [episode] if clip_starts(config, len(episode.actions)) else []
        if count_clips(config, group) >= config.shard_clips:
            shards, group = [*shards, tuple(group)], []
    shards += [tuple(group)] if group else []
    if not shards:
        bad = "".join(f"; {name} cannot be read: {why}" for name, why in [*left_out.bad_recordings.items()][:1])
        raise UserError(f"none of the {len(episodes)} {split} episodes has {config.clip_frames} frames, a clip{bad}")
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
    return Plan(split, storage.join(config.out, split), facts, tuple(shards), left_out)


def add_bad_episodes(config: EncodeConfig, plan: Plan, bad: Mapping[str, str]) -> LeftOut:
    """What the plan leaves out if its episodes `bad` (id: why) cannot be decoded."""
    lengths = [len(episode.actions) for shard in plan.shards for episode in shard if episode.id in bad]
    other_frames = plan.left_out.other_frames - sum(_count_unused_frames(config, frames) for frames in lengths)
    all_bad = {**plan.left_out.bad_recordings, **bad}
    return replace(plan.left_out, bad_recordings=all_bad, other_frames=other_frames)


def _count_unused_frames(config: EncodeConfig, frames: int) -> int:
    """Frames in no clip of an episode of `frames` frames; 0 if it has no clip at all."""
    clips = len(clip_starts(config, frames))
    return frames - config.clip_frames - (clips - 1) * min(config.stride, config.clip_frames) if clips else 0


def clip_starts(config: EncodeConfig, frames: int) -> range:
    return range(0, frames - config.clip_frames + 1, config.stride)


def count_clips(config: EncodeConfig, episodes: Sequence[Episode]) -> int:
    return sum(len(clip_starts(config, len(episode.actions))) for episode in episodes)


def _fingerprint(episode: Episode) -> str:
    """Frames and a hash of the actions. A video that was encoded again is not noticed, since no picture is read."""
    digest = hashlib.sha256(episode.actions.keyboard.tobytes() + episode.actions.mouse.tobytes())
    return f"{len(episode.actions)} frames {digest.hexdigest()[:12]}"


def _require_distinct_keys(shards: Sequence[Sequence[Episode]]) -> None:
    seen: dict[str, str] = {}
    for episode in (episode for shard in shards for episode in shard):
        other = seen.setdefault(clip_key(episode.id, 0), episode.id)
        if other != episode.id:
            raise UserError(f"episodes {other!r} and {episode.id!r} have the same name in a shard; rename one")


def require_same_plan(plan: Plan) -> None:
    """Raises UserError if the plan's folder holds another plan, or shards without a plan."""
    folder, url = plan.folder, storage.join(plan.folder, PLAN)
    if not storage.exists(url):
        if not any(name.endswith(INDEX) for name in storage.list_files(folder)):
            return
        if not storage.exists(url):  # looked at again: a worker that has just begun writes its plan before its shards
            raise UserError(f"{folder} holds shards without their {PLAN}; delete them or give another out=")
    try:
        facts = parse_object(storage.read_bytes(url), url)
    except ValueError as error:
        raise UserError(f"{error}; it is no plan: delete {folder} or give another out=") from error
    for name in plan.facts:
        if facts.get(name) != plan.facts[name]:
            change = _describe_change(facts.get(name), plan.facts[name])
            raise UserError(f"{folder} holds shards of another plan: {name} {change}; give another out= or delete it")


def _describe_change(old: Any, new: Any) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"was {old!r:.{SHOWN}}, is {new!r:.{SHOWN}}"
    names = [name for name in {**old, **new} if (name in old, old.get(name)) != (name in new, new.get(name))]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} {_describe_change(old.get(names[0]), new.get(names[0]))}{more}"


def describe_set(config: EncodeConfig, codec: Codec, plan: Plan, shards: Sequence[ShardInfo]) -> Manifest:
    return Manifest(
        game=config.game,
        layout=config.layout,
        clip_frames=config.clip_frames,
        clip_latents=count_latents(config.layout, config.clip_frames, codec.config.temporal),
        latent_channels=codec.config.channels,
        spatial=codec.config.spatial,
        temporal=codec.config.temporal,
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
