"""The nouns of the data: actions, a recording, a clip, a shard set."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from configs import limits, within
from configs.game import GameConfig
from model.config import Vision
from model.layout import CondFill, Layout


@dataclass(frozen=True)
class Actions:
    """One row per pixel frame: `action[i]` was held during frame i's interval, so it leads from frame i to i + 1."""

    keyboard: np.ndarray  # (n k) float32, 0 or 1
    mouse: np.ndarray  # (n 2) float32, (pitch, yaw) in units of the action space; (n 0) without a mouse

    def __len__(self) -> int:
        return len(self.keyboard)

    def __getitem__(self, rows: slice) -> "Actions":
        return Actions(self.keyboard[rows], self.mouse[rows])


@dataclass(frozen=True)
class Footage:
    """The pictures of a recording, decoded when asked for."""

    path: Path  # the video, or what else holds the pictures
    frames: int
    height: int  # px
    width: int  # px
    read: Callable[[int, int], Iterator[np.ndarray]]  # frames start to before stop, (h w 3) uint8 RGB, as recorded
    is_video: bool = True
    changes: str = ""  # what is done to the stored pictures to show them as a player does, in words


@dataclass(frozen=True)
class Episode:
    """A span of a recording's frames with their actions, whatever format it came in."""

    id: str
    actions: Actions  # (n) rows, one per frame of the episode
    footage: Footage
    first: int  # recorded frame
    stop: int  # one past the last recorded frame
    shown: np.ndarray | None = None  # (stop - first) how often each recorded frame comes; once without

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, (h w 3) uint8 RGB, as recorded."""
        recorded = self.footage.read(self.first, self.stop)
        if self.shown is None:
            yield from recorded
        else:
            for frame, times in zip(recorded, self.shown.tolist(), strict=True):
                yield from repeat(frame, times)


@dataclass(frozen=True)
class Clip:
    """One training sample: normalised latents and the actions of the same pixel frames."""

    latents: torch.Tensor  # (c f h w) bfloat16
    keyboard: torch.Tensor  # (n k) float32
    mouse: torch.Tensor  # (n 2) float32
    first_frame: bytes  # JPEG
    episode: str
    start: int  # pixel frame of the episode at which the clip begins
    visual: torch.Tensor | None = None  # (m c) bfloat16, CLIP tokens of the first frame
    image_latents: torch.Tensor | None = None  # (c f h w) bfloat16, of the first frame followed by grey


@dataclass(frozen=True)
class Source:
    """A shard set that is mixed with others."""

    path: str  # of its manifest
    weight: float = within(1e-9, 1000, 1.0)  # how often each of its clips comes per epoch, whose order is in memory


@dataclass(frozen=True)
class Batch:
    """Clips of one rank, stacked."""

    latents: torch.Tensor  # (b c f h w)
    keyboard: torch.Tensor  # (b n k)
    mouse: torch.Tensor  # (b n 2)
    ids: tuple[str, ...]  # "episode:start" of each clip
    visual: torch.Tensor | None = None  # (b m c), see Clip
    image_latents: torch.Tensor | None = None  # (b c f h w), see Clip
    skipped: int = 0  # clips that could not be read, for which others stand in

    def to(self, device: torch.device) -> "Batch":
        """On the device; from pinned memory, the copy is made while the CPU goes on."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), self.ids)

    def __getitem__(self, rows: slice) -> "Batch":
        return self._map(lambda tensor: tensor[rows], self.ids[rows])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], ids: tuple[str, ...]) -> "Batch":
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, ids=ids, **changed)


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the set."""

    url: str  # file name, beside the manifest
    clips: int = field(metadata=limits(0, 10_000_000))
    bytes: int = field(metadata=limits(0, 1 << 60))
    sha256: str
    episodes: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a shard set is; written last, so that its presence means that the set is complete."""

    game: GameConfig
    layout: Layout
    clip_frames: int  # pixel frames of one clip
    clip_latents: int  # latent frames of one clip
    latent_channels: int = field(metadata=limits(1, 1 << 16))
    codec: str  # name of the codec
    codec_hash: str  # SHA-256 of its weights, first 12 hex digits
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...] = field(metadata=limits(1e-9, 1e9))
    plan_hash: str  # over everything that decides what is in the shards
    split: str  # train or heldout
    spatial: int = within(1, 1024, 8)  # pixels per latent, each way
    temporal: int = within(1, 1024, 4)  # frames per latent, after the first
    vision: Vision = "none"  # CLIP tokens that the clips carry
    unknown: CondFill = "zeros"  # of the conditioning's latents that are not given; grey: the clips carry it
    shards: tuple[ShardInfo, ...] = field(default_factory=tuple)

    @property
    def clips(self) -> int:
        return sum(shard.clips for shard in self.shards)
