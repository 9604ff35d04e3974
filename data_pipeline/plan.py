"""The settings of `encode`, and its plan: which clips of which episodes go into which shard."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Literal

from tqdm import tqdm

from configs import flat, storage, to_dict, within
from configs.errors import UserError, one_line
from configs.game import GameConfig
from configs.untrusted import parse_object, reading
from data_pipeline.readers import Reader, Recording, count_cut, describe_crop, find_recordings, split_episodes
from data_pipeline.readers.recording import BAD_RECORDING, say
from data_pipeline.shards import INDEX, clip_key, count_latents
from data_pipeline.types import Episode, Manifest, ShardInfo
from model.codec import Codec, codec_hash
from model.config import Vision
from model.layout import CHUNK_FRAMES, CondFill, Layout
from model.vision import vision_hash

PLAN = "plan.json"
NO_FACTS = ("source", "out", "vision_weights", "device", "on_bad_recording")  # change no byte of a shard


@dataclass(frozen=True)
class EncodeConfig:
    """`python -m data_pipeline encode`."""

    game: GameConfig
    source: str  # folder of recordings
    codec: str  # folder of the codec
    out: str  # gets train/ and heldout/, each with shards and a manifest
    reader: Reader = "worldloom"  # format of the recordings
    layout: Layout = "chunked"
    clip_frames: int = within(1, 10_000, 18)
    stride: int = within(1, 1_000_000, 9)  # frames between the starts of two clips
    shard_clips: int = within(1, 1_000_000, 100)  # a shard is closed after the episode that reaches this
    heldout_every: int = 10  # every n-th episode is held out; 0 holds out nothing
    vision: Vision = "none"  # CLIP tokens of each clip's first frame, for a model with that model.vision
    vision_weights: str | None = None  # of CLIP's vision tower
    unknown: CondFill = "zeros"  # grey: each clip carries its first frame's conditioning as the released models have it
    # Runs of frames, of all episodes of a shard, that the codec encodes at once. Few: the next ones are decoded
    # meanwhile, and glibc gives tensors above 32 MB back to the system after each use, which took as long as encoding.
    # Part of the plan, since a matrix product may round its last bit differently in another batch.
    batch: int = within(1, 10_000, 4)
    device: Literal["auto", "cpu"] = "auto"  # auto: this process's GPU if there is one
    on_bad_recording: Literal["stop", "skip"] = "stop"  # skip: what cannot be read or decoded is left out and listed

    def __post_init__(self) -> None:
        if (self.vision == "none") != (self.vision_weights is None):
            raise UserError(f"vision={self.vision} and vision_weights={self.vision_weights}: give both or neither")
        if self.unknown == "grey" and self.layout != "continuous":
            raise UserError("unknown=grey is how a causal model is conditioned; it needs layout=continuous")

    @property
    def run_frames(self) -> int:
        """Frames that the codec encodes at once: a chunk, or the whole clip."""
        return CHUNK_FRAMES if self.layout == "chunked" else self.clip_frames


@dataclass(frozen=True)
class ShardJob:
    """A shard to be made unless it is there."""

    config: EncodeConfig
    url: str
    episodes: Sequence[Episode]  # in order
    left_out: Mapping[str, str] = field(default_factory=dict)  # episodes that could not be decoded, and why

    @property
    def clips(self) -> int:
        return count_clips(self.config, self.episodes)

    def without(self, episode: str, error: Exception) -> "ShardJob":
        """The same shard as if the episode, which cannot be decoded, had not been planned."""
        rest = [other for other in self.episodes if other.id != episode]
        return replace(self, episodes=rest, left_out={**self.left_out, episode: describe_fault(self.config, error)})


@dataclass(frozen=True)
class LeftOut:
    """What a set leaves out of its recordings. Frames are counted at the game's rate, but for `cut_frames`."""

    bad_recordings: Mapping[str, str]  # recordings that cannot be read, and episodes that cannot be decoded: why
    empty_recordings: Sequence[str]  # those of which the reader keeps nothing
    short_episodes: Mapping[str, int]  # shorter than a clip: their frames
    other_frames: int  # of the other episodes: what is in no clip
    cut_frames: int  # as recorded, that readers keep out of every episode, as far as they say so


@dataclass(frozen=True)
class Plan:
    """What goes into one shard set; a function of the config and the recordings' actions alone."""

    config: EncodeConfig
    split: str
    facts: dict[str, Any]  # everything that decides what is in the shards; its hash is the manifest's plan_hash
    jobs: Sequence[ShardJob]
    unread: LeftOut  # before any frame is decoded

    @property
    def folder(self) -> str:
        return storage.join(self.config.out, self.split)

    def require_same(self) -> None:
        """Writes the plan. Raises UserError if the set's folder holds another, or shards without one."""
        url = storage.join(self.folder, PLAN)
        if not storage.exists(url):
            shards = any(name.endswith(INDEX) for name in storage.list_folder(self.folder))
            if shards and not storage.exists(url):  # another worker writes its plan, then its shards
                raise UserError(f"{self.folder} holds shards without their {PLAN}; delete them or give another out=")
            storage.create(url, (json.dumps(self.facts, indent=1) + "\n").encode())
        with reading(url, f"delete {self.folder} or give another out="):
            facts = parse_object(storage.read_bytes(url), url)
            theirs, ours = flat({name: facts.get(name) for name in self.facts}), flat(self.facts)
        changed = [name for name in {**theirs, **ours} if theirs.get(name, MISSING) != ours.get(name, MISSING)]
        if changed:
            was, now = (f"{values.get(changed[0])!r:.60}" for values in (theirs, ours))
            change = f"{changed[0]} was {was}, is {now}" + (f", and {len(changed) - 1} more" if changed[1:] else "")
            raise UserError(f"{self.folder} holds shards of another plan: {change}; give another out= or delete it")

    def left_out(self, bad: Mapping[str, str]) -> LeftOut:
        """What the set leaves out if the episodes `bad` (id: why) cannot be decoded."""
        config, unused = self.config, 0
        for episode in (episode for job in self.jobs for episode in job.episodes if episode.id not in bad):
            covered = config.clip_frames + (count_clips(config, [episode]) - 1) * min(config.stride, config.clip_frames)
            unused += len(episode.actions) - covered
        return replace(self.unread, bad_recordings={**self.unread.bad_recordings, **bad}, other_frames=unused)

    def manifest(self, codec: Codec, shards: Sequence[ShardInfo]) -> Manifest:
        """The set's manifest."""
        config, codec_config = self.config, codec.config
        return Manifest(
            game=config.game,
            layout=config.layout,
            clip_frames=config.clip_frames,
            clip_latents=count_latents(config.layout, config.clip_frames, codec_config.temporal),
            latent_channels=codec_config.channels,
            spatial=codec_config.spatial,
            temporal=codec_config.temporal,
            codec=self.facts["codec"],
            codec_hash=self.facts["codec_hash"],
            latent_mean=tuple(codec.latent_mean.tolist()),
            latent_std=tuple(codec.latent_std.tolist()),
            plan_hash=hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12],
            split=self.split,
            vision=config.vision,
            unknown=config.unknown,
            shards=tuple(shards),
        )


def make_plans(config: EncodeConfig, codec: Codec) -> list[Plan]:
    """The plan of each split. Reads every recording's actions, no frames.

    A recording is held out by its position among all recordings, bad ones included, so a bad one moves no other.
    """
    count_latents(config.layout, config.clip_frames, codec.config.temporal)  # a UserError if they are no clip
    recordings = find_recordings(config.reader, config.source)
    train, heldout = split_episodes(recordings, config.heldout_every)
    if config.heldout_every and not heldout:
        raise UserError(f"heldout_every={config.heldout_every} holds out none of {len(recordings)} recordings")
    splits = {"train": train} | ({"heldout": heldout} if heldout else {})
    with tqdm(total=len(recordings), desc="check recordings", unit="recording", disable=None) as bar:
        plans = [_make_plan(config, codec, split, *_read_all(config, part, bar)) for split, part in splits.items()]
    planned = [episode for plan in plans for job in plan.jobs for episode in job.episodes]
    if crop := describe_crop(planned, config.game):
        say(crop)
    return plans


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
    short = {each.id: len(each.actions) for each in episodes if len(each.actions) < config.clip_frames}
    return episodes, LeftOut(bad, empty, short, 0, cut)


def describe_fault(config: EncodeConfig, error: Exception) -> str:
    """What is wrong with a recording, in one line that does not depend on where the source lies."""
    return one_line(error).replace(str(config.source).rstrip("/") + "/", "")


def _make_plan(config: EncodeConfig, codec: Codec, split: str, episodes: list[Episode], left_out: LeftOut) -> Plan:
    groups, group = list[list[Episode]](), list[Episode]()
    for episode in episodes:
        group += [episode] if clip_starts(config, len(episode.actions)) else []
        if count_clips(config, group) >= config.shard_clips:
            groups, group = [*groups, group], []
    groups += [group] if group else []
    if not groups:
        bad = "".join(f"; {name} cannot be read: {why}" for name, why in [*left_out.bad_recordings.items()][:1])
        raise UserError(f"none of the {len(episodes)} {split} episodes has {config.clip_frames} frames, a clip{bad}")
    _require_distinct_keys([episode.id for group in groups for episode in group])
    urls = (storage.join(config.out, f"{split}/shard-{i:06d}.tar") for i in range(len(groups)))
    jobs = [ShardJob(config, url, group) for url, group in zip(urls, groups, strict=True)]
    facts = {
        **{name: value for name, value in to_dict(config).items() if name not in NO_FACTS},
        "codec": codec.config.name,
        "codec_hash": codec_hash(config.codec),
        "vision_hash": vision_hash(config.vision_weights) if config.vision_weights else None,
        "split": split,
        "episodes": {episode.id: _fingerprint(episode) for episode in episodes},
    }
    return Plan(config, split, facts, jobs, left_out)


def clip_starts(config: EncodeConfig, frames: int) -> range:
    return range(0, frames - config.clip_frames + 1, config.stride)


def count_clips(config: EncodeConfig, episodes: Sequence[Episode]) -> int:
    return sum(len(clip_starts(config, len(episode.actions))) for episode in episodes)


def _fingerprint(episode: Episode) -> str:
    """Frames and a hash of the actions. A video that was encoded again is not noticed, since no picture is read."""
    digest = hashlib.sha256(episode.actions.keyboard.tobytes() + episode.actions.mouse.tobytes())
    return f"{len(episode.actions)} frames {digest.hexdigest()[:12]}"


def _require_distinct_keys(episodes: Sequence[str]) -> None:
    by_key: dict[str, str] = {}
    for episode in episodes:
        if (other := by_key.setdefault(clip_key(episode, 0), episode)) != episode:
            raise UserError(f"episodes {other!r} and {episode!r} have the same name in a shard; rename one")
