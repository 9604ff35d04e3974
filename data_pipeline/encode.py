"""Recordings to shards of latents: plan, encode what is missing, write the manifest last."""

import hashlib
import io
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from configs import to_dict
from data_pipeline import storage
from data_pipeline.readers import READERS, find_episodes, read_game_frames, split_episodes
from data_pipeline.shards import MANIFEST, clip_key, find_fault, index_url, read_index, save_manifest, write_shard
from data_pipeline.types import CHUNK_FRAMES, Clip, Episode, GameConfig, Layout, Manifest, ShardInfo
from data_pipeline.video import to_video
from model.codec import TEMPORAL, Codec, codec_hash, load_codec
from model.conditioning import MASK_CHANNELS, Unknown
from model.vision import Vision, VisionTower, image_conditions, load_vision, vision_hash, visual_context

T = TypeVar("T")
PLAN, SHARD = "plan.json", "shard-{:06d}.tar"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class EncodeConfig:
    """`python -m data_pipeline encode`."""

    game: GameConfig
    source: str  # folder of recordings
    codec: str  # folder of the codec
    out: str  # gets train/ and heldout/, each with shards and a manifest
    reader: str = "worldloom"
    layout: Layout = "chunked"
    clip_frames: int = 18
    stride: int = 9  # frames between the starts of two clips
    shard_clips: int = 100  # a shard is closed after the episode that reaches this
    heldout_every: int = 10  # every n-th episode is held out; 0 holds out nothing
    vision: Vision = "none"  # CLIP tokens of each clip's first frame, for a model with that model.vision
    vision_weights: str | None = None  # of CLIP's vision tower
    unknown: Unknown = "zeros"  # grey: each clip carries its first frame's conditioning as the released models have it
    # Runs of frames that the codec encodes at once. Few, so that the next ones are decoded meanwhile; and tensors above
    # 32 MB are given back to the system after every use (glibc), which cost as much time as the encoding.
    batch: int = 4

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise ValueError(f"no reader {self.reader!r}; there are: {', '.join(READERS)}")
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


class Encoded(NamedTuple):
    """What a run did."""

    clips: int  # of the whole set
    new_clips: int
    shards: int
    manifests: tuple[str, ...]
    seconds: float


def encode_recordings(config: EncodeConfig) -> Encoded:
    """Writes the shards that are not there yet, then each set's manifest; started again it goes on.

    Raises ValueError in one line, before anything is written, for an episode that cannot be read and for a folder
    that holds the shards of another plan.
    """
    start, made = time.perf_counter(), 0
    codec = load_codec(config.codec)
    tower = load_vision(config.vision_weights) if config.vision_weights else None
    plans = make_plans(config, codec)
    for plan in plans:
        _require_same_plan(plan, storage.join(config.out, plan.split))
        storage.remove_unfinished(storage.join(config.out, plan.split))
    clips = sum(_count_clips(config, episodes) for plan in plans for episodes in plan.shards)
    manifests = []
    with tqdm(total=clips, desc="encode", unit="clip", smoothing=0.1, disable=None) as bar:
        for plan in plans:
            folder = storage.join(config.out, plan.split)
            storage.write_text(storage.join(folder, PLAN), json.dumps(plan.facts, indent=1) + "\n")
            shards = []
            for i, episodes in enumerate(plan.shards):
                name = SHARD.format(i)
                info = _find_complete(storage.join(folder, name))
                if info is None:
                    encoded = (clip for episode in episodes for clip in encode_episode(codec, config, episode, tower))
                    info = write_shard(folder, name, _counted(encoded, bar))
                    made += info.clips
                else:
                    bar.update(info.clips)
                shards.append(info)
            manifests.append(storage.join(folder, MANIFEST))
            save_manifest(_describe(config, codec, plan, shards), manifests[-1])
    return Encoded(clips, made, sum(len(p.shards) for p in plans), tuple(manifests), time.perf_counter() - start)


def make_plans(config: EncodeConfig, codec: Codec) -> list[Plan]:
    """The plan of each split: which episodes go into which shard. Reads every recording's actions, no frames."""
    folders = find_episodes(config.source)
    read = READERS[config.reader]
    bar = tqdm(folders, desc="check recordings", unit="episode", disable=None)
    episodes = [read(folder, config.game) for folder in bar]
    train, heldout = split_episodes(episodes, config.heldout_every)
    if config.heldout_every and not heldout:
        raise ValueError(
            f"{len(episodes)} episodes hold out none with heldout_every={config.heldout_every}; "
            "record more or set it smaller (0 holds out nothing)"
        )
    parts = [("train", train), ("heldout", heldout)] if heldout else [("train", train)]
    return [_make_plan(config, codec, split, part) for split, part in parts]


def _make_plan(config: EncodeConfig, codec: Codec, split: str, episodes: Sequence[Episode]) -> Plan:
    shards, group = [], []
    for episode in episodes:
        group += [episode] if _clip_starts(config, len(episode.actions)) else []
        if _count_clips(config, group) >= config.shard_clips:
            shards, group = [*shards, tuple(group)], []
    shards += [tuple(group)] if group else []
    if not shards:
        raise ValueError(f"none of the {len(episodes)} {split} episodes has the {config.clip_frames} frames of a clip")
    _require_distinct_keys(shards)
    no_facts = ("source", "out", "batch", "vision_weights")
    settings = {name: value for name, value in to_dict(config).items() if name not in no_facts}
    facts = {
        **settings,
        "codec": codec.config.name,
        "codec_hash": codec_hash(config.codec),
        "vision_hash": vision_hash(config.vision_weights) if config.vision_weights else None,
        "split": split,
        "episodes": {episode.id: _fingerprint(episode) for episode in episodes},
    }
    return Plan(split, facts, tuple(shards))


def encode_episode(
    codec: Codec, config: EncodeConfig, episode: Episode, tower: VisionTower | None = None
) -> Iterator[Clip]:
    """The episode's clips in order; each run of frames is encoded once, however many clips share it."""
    clip_starts = _clip_starts(config, len(episode.actions))
    starts = deque(clip_starts)
    offsets = range(0, config.clip_frames, config.run_frames)
    wanted = sorted({start + offset for start in starts for offset in offsets})
    runs = cut_runs(read_game_frames(episode, config.game), wanted, config.run_frames)
    latents: dict[int, torch.Tensor] = {}
    first_frames: dict[int, FirstFrame] = {}
    for group in read_ahead(iter(lambda: list(islice(runs, config.batch)), [])):
        encoded = encode_runs(codec, np.stack([frames for _, frames in group]))
        latents.update(zip((start for start, _ in group), encoded, strict=True))
        clips = {start: frames[0] for start, frames in group if start in clip_starts}
        first_frames.update((start, describe_frame(codec, tower, config, frame)) for start, frame in clips.items())
        while starts and starts[0] + offsets[-1] in latents:
            start = starts.popleft()
            rows = episode.actions[start : start + config.clip_frames]
            yield Clip(
                latents=torch.cat([latents[start + offset] for offset in offsets], dim=1),
                keyboard=torch.from_numpy(rows.keyboard),
                mouse=torch.from_numpy(rows.mouse),
                episode=episode.id,
                start=start,
                **first_frames.pop(start)._asdict(),
            )
        for done in [run for run in latents if not starts or run < starts[0]]:
            del latents[done]


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while the last one is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        upcoming = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield cast(T, item)


def cut_runs(frames: Iterator[np.ndarray], starts: Sequence[int], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """The runs (n h w c) of `length` frames that begin at the ascending `starts`, holding one run at a time."""
    wanted, window = deque(starts), deque(maxlen=length)
    for i, frame in enumerate(frames):
        window.append(frame)
        if wanted and i + 1 - length == wanted[0]:
            yield wanted.popleft(), np.stack(window)


class FirstFrame(NamedTuple):
    """What a clip carries of its first frame; see Clip."""

    first_frame: bytes
    visual: torch.Tensor | None
    image_latents: torch.Tensor | None


@torch.no_grad()
def describe_frame(codec: Codec, tower: VisionTower | None, config: EncodeConfig, frame: np.ndarray) -> FirstFrame:
    """A clip's first frame (h w 3) uint8 as its JPEG and as what the model will be told of it."""
    visual = image_latents = None
    if tower is not None or config.unknown == "grey":
        image = to_video(torch.from_numpy(frame[None, None]))[:, :, 0]
        tokens = visual_context(tower, image, config.vision)
        visual = None if tokens is None else tokens[0].bfloat16()
        if config.unknown == "grey":
            cond = next(image_conditions(codec, image, 1 + (config.clip_frames - 1) // TEMPORAL))
            image_latents = cond[0, MASK_CHANNELS:].bfloat16()
    return FirstFrame(_jpeg(frame), visual, image_latents)


@torch.no_grad()
def encode_runs(codec: Codec, frames: np.ndarray) -> torch.Tensor:
    """Normalised latents (b c f h w) in bfloat16 of frames (b n h w 3) uint8."""
    return codec.encode(to_video(torch.from_numpy(frames))).bfloat16()


def _clip_starts(config: EncodeConfig, frames: int) -> range:
    return range(0, frames - config.clip_frames + 1, config.stride)


def _count_clips(config: EncodeConfig, episodes: Sequence[Episode]) -> int:
    return sum(len(_clip_starts(config, len(episode.actions))) for episode in episodes)


def _fingerprint(episode: Episode) -> str:
    """Frames and a hash of the actions: tells a recording that was made anew from the one that was encoded."""
    digest = hashlib.sha256(episode.actions.keyboard.tobytes() + episode.actions.mouse.tobytes())
    return f"{len(episode.actions)} frames {digest.hexdigest()[:12]}"


def _require_distinct_keys(shards: Sequence[Sequence[Episode]]) -> None:
    seen: dict[str, str] = {}
    for episode in (episode for shard in shards for episode in shard):
        other = seen.setdefault(clip_key(episode.id, 0), episode.id)
        if other != episode.id:
            raise ValueError(f"episodes {other!r} and {episode.id!r} have the same name in a shard; rename one")


def _require_same_plan(plan: Plan, folder: str) -> None:
    url = storage.join(folder, PLAN)
    if not storage.exists(url):
        return
    found = json.loads(storage.read_bytes(url))
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


def _find_complete(url: str) -> ShardInfo | None:
    """What the index of a shard says if the shard is there and whole, else None."""
    if not storage.exists(index_url(url)):
        return None
    info, _ = read_index(url)
    return None if find_fault(url, info) else info


def _counted(clips: Iterator[Clip], bar: tqdm) -> Iterator[Clip]:
    for clip in clips:
        yield clip
        bar.update()


def _jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _describe(config: EncodeConfig, codec: Codec, plan: Plan, shards: Sequence[ShardInfo]) -> Manifest:
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
