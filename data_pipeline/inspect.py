"""What a shard set holds: a few lines of text, and a page with pictures, actions and a few clips as video."""

import base64
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from configs import storage
from configs.errors import UserError
from configs.files import require_other_files
from data_pipeline.overlay import Overlay, enlarge
from data_pipeline.page import Html, h, page_of
from data_pipeline.shard_set import Shards
from data_pipeline.types import Clip, Manifest
from data_pipeline.video import to_uint8, write_video
from model.codec import Codec, codec_hash, load_codec
from model.layout import CHUNK_LATENTS

BINS = 41  # of the mouse's histograms


@dataclass(frozen=True)
class InspectConfig:
    """`python -m data_pipeline inspect MANIFEST`."""

    manifest: str
    out: str | None = None  # folder that gets index.html and the videos
    codec: str | None = None  # the one that encoded the set: to show clips as video
    videos: int = 4  # clips as video
    pictures: int = 24  # first frames
    looked_at: int = 256  # clips, spread over all of the set, whose actions are counted

    def __post_init__(self) -> None:
        if min(self.videos, self.pictures) < 0 or self.looked_at < 1:
            raise UserError(
                f"videos={self.videos} and pictures={self.pictures} must be 0 or more, looked_at={self.looked_at} "
                "1 or more"
            )


def inspect(config: InspectConfig) -> None:
    """Say what a manifest holds, and write a page: inspect MANIFEST out=FOLDER codec=runs/my/codec"""
    if config.out is not None:
        read = {"manifest": config.manifest, "codec": storage.files_at(config.codec) if config.codec else None}
        require_other_files([storage.join(config.out, "index.html")], read)
    shards = Shards(config.manifest, verify=False)
    actions = read_actions(shards, config.looked_at)
    for line in summarise(config.manifest, shards, actions):
        print(line)
    if config.out is not None:
        with storage.writing_folder(config.out, last="index.html") as folder:
            write_page(config, shards, actions, folder)
        print(storage.join(config.out, "index.html"))


@dataclass(frozen=True)
class Counted:
    """The actions of some clips, one row per frame."""

    keyboard: torch.Tensor  # (n k)
    mouse_deg: torch.Tensor  # (n 2) pitch and yaw; (n 0) without a mouse


def read_actions(shards: Shards, looked_at: int) -> Counted:
    """Those of `looked_at` clips spread over all of the set."""
    clips = [shards.read(number) for number in spread(shards, looked_at)]
    keyboard, mouse = (torch.cat([clip[name] for clip in clips]) for name in ("keyboard", "mouse"))
    return Counted(keyboard, mouse * shards.manifest.game.action_space.mouse_unit_deg)


def spread(shards: Shards, wanted: int) -> list[int]:
    """Up to `wanted` numbers of clips from the first to the last."""
    count = min(wanted, len(shards))
    return np.unique(np.linspace(0, len(shards) - 1, count).astype(int)).tolist() if count else []


def summarise(url: str, shards: Shards, actions: Counted) -> list[str]:
    """Lines that say what the set at `url` holds."""
    manifest, game, space = shards.manifest, shards.manifest.game, shards.manifest.game.action_space
    megabytes = sum(info.bytes for info in manifest.shards) / 1e6
    shares = ", ".join(f"{key} {share:.0%}" for key, share in key_shares(manifest, actions).items())
    per_episode = list(Counter(entry.episode for _, entry in shards.places).values())
    lines = [
        f"{url}: {manifest.split}, {manifest.clips} clips in {len(manifest.shards)} shards, {megabytes:.1f} MB",
        f"game {game.name!r}, {game.width}x{game.height} px, {game.fps:g} fps, action space {space.describe()}",
        f"{manifest.layout} clips of {manifest.clip_frames} frames = {manifest.clip_latents} latents, "
        f"{manifest.clip_frames / game.fps:.1f} s, codec {manifest.codec} {manifest.codec_hash}, "
        f"plan {manifest.plan_hash}",
        f"{len(per_episode)} episodes of {min(per_episode)} to {max(per_episode)} clips",
        f"keys held: {shares}",
    ]
    if space.mouse:
        pitch, yaw = actions.mouse_deg.std(0).tolist()
        lines.append(f"mouse: standard deviation of pitch {pitch:.2f}, yaw {yaw:.2f} degrees per frame")
    return lines


def key_shares(manifest: Manifest, actions: Counted) -> dict[str, float]:
    """In which share of the frames each key is held, and none."""
    found = dict(zip(manifest.game.action_space.keys, actions.keyboard.mean(0).tolist(), strict=True))
    return {**found, "none": (actions.keyboard.sum(1) == 0).float().mean().item()}


def write_page(config: InspectConfig, shards: Shards, actions: Counted, folder: Path) -> None:
    """Writes `index.html` and the videos into `folder`.

    Raises ValueError in one line for another codec than the set's.
    """
    manifest, parts = shards.manifest, list[Html]()
    codec = open_codec(config.codec, manifest) if config.codec is not None else None
    lines = summarise(config.manifest, shards, actions)
    parts += [h("p", *(part for line in lines for part in (line, h("br")))), h("h2", "Keys held")]
    parts += [bar(key, share, f"{share:.1%}") for key, share in key_shares(manifest, actions).items()]
    parts += [histogram(f"{axis} per frame", column) for axis, column in zip(
        ("pitch", "yaw"), actions.mouse_deg.T, strict=False)]  # fmt: skip
    lengths = Counter(Counter(entry.episode for _, entry in shards.places).values())
    parts.append(h("h2", "Clips per episode"))
    parts += [
        bar(f"{clips} clips", episodes / max(lengths.values()), f"{episodes} episodes")
        for clips, episodes in sorted(lengths.items())
    ]
    if codec is not None:
        parts.append(h("h2", "Clips"))
        parts.append(h("p", "Decoded from the latents, with the actions drawn onto them.", class_="faint"))
        parts += list(write_videos(folder, codec, shards, spread(shards, config.videos)))
    parts.append(h("h2", "First frames"))
    parts += [picture(shards.clip(number)) for number in spread(shards, config.pictures)]
    title = f"{manifest.game.name}, {manifest.split}"
    storage.write_text(folder / "index.html", page_of(title, h("h1", title), *parts))


def open_codec(path: str, manifest: Manifest) -> Codec:
    """The codec at `path`, if it is the one that encoded the set."""
    here = storage.local(path)
    if (found := codec_hash(here)) != manifest.codec_hash:
        raise UserError(f"codec={path} is {found}, the set was encoded by {manifest.codec_hash}; name that one")
    return load_codec(here)


def bar(name: str, share: float, said: str) -> Html:
    """A line of a bar chart."""
    return h("div", h("b", name), h("i", style=f"width: {400 * share:.0f}px"), said, class_="row")


def histogram(title: str, values: torch.Tensor) -> Html:
    """Bars of how often values (n) in degrees come; the middle 99 % of them."""
    bound = max(float(values.abs().quantile(0.995)), 1e-3)
    counts = torch.histc(values, BINS, -bound, bound)
    bars = (h("i", style=f"height: {90 * count / counts.max():.0f}px") for count in counts.tolist())
    still = (values == 0).float().mean()
    note = f"from {-bound:.2f} to {bound:.2f} degrees; exactly 0 in {still:.0%} of the frames"
    return h("section", h("h2", title), h("div", *bars, class_="bars"), h("p", note, class_="faint"))


def picture(clip: Clip) -> Html:
    """A clip's first frame."""
    data = base64.b64encode(clip.first_frame).decode()
    shown = h("img", src=f"data:image/jpeg;base64,{data}", height=96)
    return h("figure", shown, h("figcaption", f"{clip.episode}, frame {clip.start}"))


def write_videos(folder: Path, codec: Codec, shards: Shards, numbers: Sequence[int]) -> Iterator[Html]:
    """Writes each clip as mp4 with its actions drawn onto it; gives the HTML that shows it."""
    game = shards.manifest.game
    for number in numbers:
        clip = shards.clip(number)
        name = f"clip_{number:06d}.mp4"
        frames = [enlarge(frame) for frame in decode_clip(codec, clip, shards.manifest)]
        overlay = Overlay(game.action_space, *frames[0].shape[:2])
        actions = zip(frames, clip.keyboard.numpy(), clip.mouse.numpy(), strict=True)
        write_video(folder / name, (overlay.draw(*shown) for shown in actions), game.fps)
        shown = h("video", src=name, controls="", loop="", width=320)
        yield h("figure", shown, h("figcaption", f"{clip.episode}, frame {clip.start}"))


@torch.no_grad()
def decode_clip(codec: Codec, clip: Clip, manifest: Manifest) -> np.ndarray:
    """The frames (n h w 3) uint8 of a clip; chunks are decoded each by itself, as they were encoded."""
    length = CHUNK_LATENTS if manifest.layout == "chunked" else manifest.clip_latents
    chunks = rearrange(clip.latents.float(), "c (k f) h w -> k c f h w", f=length)
    video = torch.cat([codec.decode(chunk[None]) for chunk in chunks], dim=2)
    return to_uint8(video.clamp(-1, 1))[0].numpy()
