"""What a shard set holds: a few lines of text, and a page with pictures, keys and a few clips as video."""

import base64
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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

VIDEOS, PICTURES, COUNTED = 4, 24, 256  # clips shown as video, shown by their first frame, whose actions are counted


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
    lines, keys = summarise(shards)
    print("\n".join(lines))
    if config.out is not None:
        with storage.writing_folder(config.out, last="index.html") as folder:
            clips = [shards.clip(number) for number in spread(shards, PICTURES)]
            page = render(
                Path(__file__).with_name("inspect.html"),
                title=f"{shards.manifest.game.name}, {shards.manifest.split}",
                lines=lines,
                keys=keys,
                videos=list(write_videos(folder, config.codec, shards)) if config.codec else None,
                pictures=[(base64.b64encode(clip.first_frame).decode(), caption(clip)) for clip in clips],
            )
            storage.write_text(folder / "index.html", page)
        print(storage.join(config.out, "index.html"))


def spread(shards: Shards, wanted: int) -> list[int]:
    """Up to `wanted` clip numbers from the first to the last."""
    return np.unique(np.linspace(0, len(shards) - 1, min(wanted, len(shards))).astype(int)).tolist()


def summarise(shards: Shards) -> tuple[list[str], dict[str, float]]:
    """Lines about the set; and of some clips, the share of frames in which each key is held, and none."""
    manifest, game, space = shards.manifest, shards.manifest.game, shards.manifest.game.action_space
    sample = [shards.read(number) for number in spread(shards, COUNTED)]
    keyboard, mouse = (torch.cat([clip[name] for clip in sample]) for name in ("keyboard", "mouse"))
    keys = dict(zip(space.keys, keyboard.mean(0).tolist(), strict=True))
    keys["none"] = (keyboard.sum(1) == 0).float().mean().item()
    megabytes, seconds = sum(shard.info.bytes for shard in shards.shards) / 1e6, manifest.clip_frames / game.fps
    clips = Counter(entry.episode for _, entry in shards.places).values()
    lines = [
        f"{manifest.split}: {len(shards)} clips in {len(shards.shards)} shards, {megabytes:.1f} MB",
        f"game {game.name!r}, {game.width}x{game.height} px, {game.fps:g} fps, action space {space.describe()}",
        f"{manifest.layout} clips of {manifest.clip_frames} frames = {manifest.clip_latents} latents, {seconds:.1f} s",
        f"codec {manifest.codec} {manifest.codec_hash}, plan {manifest.plan_hash}",
        f"{len(clips)} episodes of {min(clips)} to {max(clips)} clips",
        f"keys held: {', '.join(f'{key} {share:.0%}' for key, share in keys.items())}",
    ]
    if space.mouse:
        pitch, yaw = (mouse * space.mouse_unit_deg).std(0).tolist()
        lines.append(f"mouse: standard deviation of pitch {pitch:.2f}, yaw {yaw:.2f} degrees per frame")
    return lines, keys


def caption(clip: Clip) -> str:
    return f"{clip.episode}, frame {clip.start}"


def write_videos(folder: Path, codec_path: str, shards: Shards) -> Iterator[tuple[str, str]]:
    """Writes some clips as mp4 with their actions drawn onto them; yields each file's name and a caption."""
    game, encoded_by = shards.manifest.game, shards.manifest.codec_hash
    if (named_hash := codec_hash(codec_path)) != encoded_by:
        raise UserError(f"codec={codec_path} is {named_hash}, the set was encoded by {encoded_by}; name that one")
    codec = load_codec(codec_path)
    for number in spread(shards, VIDEOS):
        clip = shards.clip(number)
        name = f"clip_{number:06d}.mp4"
        frames = [enlarge(frame) for frame in decode_clip(codec, clip, shards.manifest)]
        overlay = Overlay(game.action_space, *frames[0].shape[:2])
        rows = zip(frames, clip.keyboard.numpy(), clip.mouse.numpy(), strict=True)
        write_video(folder / name, (overlay.draw(*row) for row in rows), game.fps)
        yield name, caption(clip)


@torch.no_grad()
def decode_clip(codec: Codec, clip: Clip, manifest: Manifest) -> np.ndarray:
    """The frames (n h w 3) uint8 of a clip; chunks are decoded one by one, as they were encoded."""
    length = CHUNK_LATENTS if manifest.layout == "chunked" else manifest.clip_latents
    chunks = rearrange(clip.latents.float(), "c (k f) h w -> k c f h w", f=length)
    video = torch.cat([codec.decode(chunk[None]) for chunk in chunks], dim=2)
    return to_uint8(video.clamp(-1, 1))[0].numpy()
