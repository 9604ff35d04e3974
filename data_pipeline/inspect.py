"""What a shard set holds: a few lines of text, and a page with pictures, actions and a few clips as video."""

import base64
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange

from configs import storage
from configs.errors import UserError
from configs.files import require_other_files
from data_pipeline.overlay import Overlay, enlarge
from data_pipeline.page import render
from data_pipeline.shard_set import Shards
from data_pipeline.types import Clip, Manifest
from data_pipeline.video import to_uint8, write_video
from model.codec import Codec, codec_hash, load_codec
from model.layout import CHUNK_LATENTS

BINS = 41  # of the mouse's histograms
VIDEOS, PICTURES, COUNTED = 4, 24, 256  # clips that are shown as video, as a first frame, whose actions are counted


@dataclass(frozen=True)
class InspectConfig:
    """`python -m data_pipeline inspect MANIFEST`."""

    manifest: str
    out: str | None = None  # folder that gets index.html and the videos
    codec: str | None = None  # the one that encoded the set: to show clips as video


def inspect(config: InspectConfig) -> None:
    """Say what a manifest holds, and write a page: inspect MANIFEST out=FOLDER codec=runs/my/codec"""
    if config.out is not None:
        read = {"manifest": config.manifest, "codec": storage.files_at(config.codec) if config.codec else None}
        require_other_files([storage.join(config.out, "index.html")], read)
    shards = Shards(config.manifest, verify=False)
    actions = sample_actions(shards, COUNTED)
    print("\n".join(summarise(config.manifest, shards, actions)))
    if config.out is not None:
        with storage.writing_folder(config.out, last="index.html") as folder:
            storage.write_text(folder / "index.html", make_page(config, shards, actions, folder))
        print(storage.join(config.out, "index.html"))


class SampledActions(NamedTuple):
    """The actions of some clips, one row per frame."""

    keyboard: torch.Tensor  # (n k)
    mouse_deg: torch.Tensor  # (n 2) pitch and yaw; (n 0) without a mouse


def sample_actions(shards: Shards, clips: int) -> SampledActions:
    """Those of `clips` clips spread over the set."""
    read = [shards.read(number) for number in spread(shards, clips)]
    keyboard, mouse = (torch.cat([clip[name] for clip in read]) for name in ("keyboard", "mouse"))
    return SampledActions(keyboard, mouse * shards.manifest.game.action_space.mouse_unit_deg)


def spread(shards: Shards, wanted: int) -> list[int]:
    """Up to `wanted` clip numbers from the first to the last."""
    count = min(wanted, len(shards))
    return np.unique(np.linspace(0, len(shards) - 1, count).astype(int)).tolist() if count else []


def clips_per_episode(shards: Shards) -> list[int]:
    return list(Counter(entry.episode for _, entry in shards.places).values())


def summarise(url: str, shards: Shards, actions: SampledActions) -> list[str]:
    """Lines that say what the set at `url` holds."""
    manifest, game, space = shards.manifest, shards.manifest.game, shards.manifest.game.action_space
    megabytes = sum(info.bytes for info in manifest.shards) / 1e6
    shares = ", ".join(f"{key} {share:.0%}" for key, share in key_shares(manifest, actions).items())
    clips = clips_per_episode(shards)
    lines = [
        f"{url}: {manifest.split}, {manifest.clips} clips in {len(manifest.shards)} shards, {megabytes:.1f} MB",
        f"game {game.name!r}, {game.width}x{game.height} px, {game.fps:g} fps, action space {space.describe()}",
        f"{manifest.layout} clips of {manifest.clip_frames} frames = {manifest.clip_latents} latents, "
        f"{manifest.clip_frames / game.fps:.1f} s, codec {manifest.codec} {manifest.codec_hash}, "
        f"plan {manifest.plan_hash}",
        f"{len(clips)} episodes of {min(clips)} to {max(clips)} clips",
        f"keys held: {shares}",
    ]
    if space.mouse:
        pitch, yaw = actions.mouse_deg.std(0).tolist()
        lines.append(f"mouse: standard deviation of pitch {pitch:.2f}, yaw {yaw:.2f} degrees per frame")
    return lines


def key_shares(manifest: Manifest, actions: SampledActions) -> dict[str, float]:
    """The share of frames in which each key is held, and none."""
    shares = dict(zip(manifest.game.action_space.keys, actions.keyboard.mean(0).tolist(), strict=True))
    return {**shares, "none": (actions.keyboard.sum(1) == 0).float().mean().item()}


def make_page(config: InspectConfig, shards: Shards, actions: SampledActions, folder: Path) -> str:
    """The page as HTML; its videos are written into `folder`."""
    manifest = shards.manifest
    videos = None
    if config.codec is not None:
        codec = open_codec(config.codec, manifest)
        videos = list(write_videos(folder, codec, shards, spread(shards, VIDEOS)))
    clips = [shards.clip(number) for number in spread(shards, PICTURES)]
    lengths = Counter(clips_per_episode(shards))
    return render(
        Path(__file__).with_name("inspect.html"),
        title=f"{manifest.game.name}, {manifest.split}",
        lines=summarise(config.manifest, shards, actions),
        keys=key_shares(manifest, actions),
        mouse=[histogram(*axis) for axis in zip(("pitch", "yaw"), actions.mouse_deg.T, strict=False)],
        episodes_of=dict(sorted(lengths.items())),
        most_episodes=max(lengths.values()),
        videos=videos,
        pictures=[(base64.b64encode(clip.first_frame).decode(), caption(clip)) for clip in clips],
    )


def open_codec(path: str, manifest: Manifest) -> Codec:
    """The codec at `path`, if it is the one that encoded the set."""
    here = storage.local(path)
    if (own_hash := codec_hash(here)) != manifest.codec_hash:
        raise UserError(f"codec={path} is {own_hash}, the set was encoded by {manifest.codec_hash}; name that one")
    return load_codec(here)


def histogram(name: str, values: torch.Tensor) -> dict[str, Any]:
    """How often values (n) in degrees come, relative to the most frequent one; the middle 99 % of them."""
    bound = max(float(values.abs().quantile(0.995)), 1e-3)
    counts = torch.histc(values, BINS, -bound, bound)
    still = (values == 0).float().mean()
    note = f"from {-bound:.2f} to {bound:.2f} degrees; exactly 0 in {still:.0%} of the frames"
    return {"name": name, "heights": (counts / counts.max()).tolist(), "note": note}


def caption(clip: Clip) -> str:
    return f"{clip.episode}, frame {clip.start}"


def write_videos(folder: Path, codec: Codec, shards: Shards, numbers: list[int]) -> Iterator[tuple[str, str]]:
    """Writes each clip as mp4 with its actions drawn onto it; yields the file's name and a caption."""
    game = shards.manifest.game
    for number in numbers:
        clip = shards.clip(number)
        name = f"clip_{number:06d}.mp4"
        frames = [enlarge(frame) for frame in decode_clip(codec, clip, shards.manifest)]
        overlay = Overlay(game.action_space, *frames[0].shape[:2])
        actions = zip(frames, clip.keyboard.numpy(), clip.mouse.numpy(), strict=True)
        write_video(folder / name, (overlay.draw(*shown) for shown in actions), game.fps)
        yield name, caption(clip)


@torch.no_grad()
def decode_clip(codec: Codec, clip: Clip, manifest: Manifest) -> np.ndarray:
    """The frames (n h w 3) uint8 of a clip; chunks are decoded each by itself, as they were encoded."""
    length = CHUNK_LATENTS if manifest.layout == "chunked" else manifest.clip_latents
    chunks = rearrange(clip.latents.float(), "c (k f) h w -> k c f h w", f=length)
    video = torch.cat([codec.decode(chunk[None]) for chunk in chunks], dim=2)
    return to_uint8(video.clamp(-1, 1))[0].numpy()
