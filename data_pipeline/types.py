"""The nouns of the data: what can be pressed, a recording, a clip, a shard set."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from configs import to_dict
from model.conditioning import Unknown
from model.vision import Vision

Layout = Literal["chunked", "continuous"]
MOST_PX = 8192  # of a picture's side
CHUNK_FRAMES = 9  # pixel frames of one chunk of the chunked layout: 1 + 2 x 4
CHUNK_LATENTS = 3  # latents of such a chunk


@dataclass(frozen=True)
class ActionSpace:
    """Which keys exist, in the order of the keyboard vector, and what one unit of mouse movement is."""

    name: str
    keys: tuple[str, ...]  # names, in the order of the keyboard vector
    caps: tuple[str, ...] = ()  # what the overlay writes on each key; the names if empty
    mouse: bool = True  # (pitch, yaw); pitch > 0 looks up, yaw > 0 turns right
    mouse_unit_deg: float = 1.0  # degrees per frame that count as 1 in the mouse vector

    def __post_init__(self) -> None:
        if not self.keys or len(set(self.keys)) != len(self.keys):
            raise ValueError(f"action space {self.name!r}: keys must be given and distinct, not {self.keys}")
        if self.caps and len(self.caps) != len(self.keys):
            raise ValueError(f"action space {self.name!r}: {len(self.caps)} caps for {len(self.keys)} keys")
        if self.mouse_unit_deg <= 0:
            raise ValueError(f"action space {self.name!r}: mouse_unit_deg must be positive, not {self.mouse_unit_deg}")

    def describe(self) -> str:
        """Name, keys and mouse unit, for messages."""
        mouse = f"mouse unit {self.mouse_unit_deg:g} deg" if self.mouse else "no mouse"
        return f"{self.name!r} ({', '.join(self.keys)}; {mouse})"

    @property
    def hash(self) -> str:
        """Twelve hex digits over everything that changes what a vector means (not the caps)."""
        meaning = {key: value for key, value in to_dict(self).items() if key != "caps"}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class InputConfig:
    """How recordings differ from the game: their rate, and what formats of others call its actions."""

    fps: float | None = None  # of the recordings, if it is more than the game's: they are resampled
    times: Literal["even", "resample"] = "even"  # of a video's frames: uneven ones are refused, or taken by their times
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)  # key of the action space: inputs, any holds it
    others: Literal["refuse", "drop"] = "refuse"  # what becomes of inputs that hold no key
    pitch_deg: float = 0.0  # degrees up per recorded unit of the mouse's y; a pixel, counted downwards: below 0
    yaw_deg: float = 0.0  # degrees right per recorded unit of the mouse's x
    axes: tuple[str, ...] = ()  # LeRobot: the components of `action` that are the mouse's y and x
    camera: str | None = None  # LeRobot: which video, where there are several
    offset_s: float = 0.0  # s that a log of events is moved against the video; > 0: things happened later in it
    columns: dict[str, str] = field(default_factory=dict)  # event_log, table: time, keys, dx, ...: what it calls them
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)  # event_log: press, release, ...: the log's words
    time_unit: Literal["s", "ms", "us", "ns"] = "s"  # event_log: of the log's times
    first_entry: Literal[0, 1, 2] = 1  # GF-Minecraft: the entry that leads on from frame 0

    def __post_init__(self) -> None:
        if self.axes and len(self.axes) != 2:
            raise ValueError(f"game.inputs.axes must name two components, the mouse's y and x, not {list(self.axes)}")


@dataclass(frozen=True)
class GameConfig:
    """What is true of a game and of every clip cut from it."""

    name: str
    action_space: ActionSpace
    fps: float  # frames per second of recordings and of everything generated
    height: int  # px, a multiple of 16
    width: int  # px, a multiple of 16
    inputs: InputConfig = field(default_factory=InputConfig)  # travels with the shards, so that they can be judged

    def __post_init__(self) -> None:
        sizes = (self.height, self.width)
        if not 0.1 <= self.fps <= 1000 or min(sizes) < 1 or max(sizes) > MOST_PX:
            raise ValueError(
                f"{self.name}: fps={self.fps:g} must be from 0.1 to 1000, height={self.height} and width={self.width} "
                f"from 1 to {MOST_PX}"
            )
        if self.inputs.fps is not None and self.inputs.fps < self.fps:
            raise ValueError(
                f"{self.name}: inputs.fps={self.inputs.fps:g} must be at least the game's {self.fps:g}: frames can be "
                "left out, not invented"
            )
        if self.height % 16 or self.width % 16:
            raise ValueError(f"{self.name}: {self.height}x{self.width} px must be multiples of 16 (codec 8 x patch 2)")
        differing = set(self.inputs.keys) ^ set(self.action_space.keys) if self.inputs.keys else set()
        if differing:
            raise ValueError(
                f"{self.name}: inputs.keys must name every key of the action space and no other; "
                f"{', '.join(sorted(differing))} stands on one side only ([] is a key that nothing holds)"
            )


@dataclass(frozen=True)
class Actions:
    """One row per pixel frame: `action[i]` was held during frame i's interval, so it leads from frame i to i + 1."""

    keyboard: np.ndarray  # (n k) float32, 0 or 1
    mouse: np.ndarray  # (n 2) float32, (pitch, yaw) in units of the action space; (n 0) without a mouse

    def __len__(self) -> int:
        return len(self.keyboard)

    def __getitem__(self, rows: slice) -> "Actions":
        return Actions(self.keyboard[rows], self.mouse[rows])


class Episode(Protocol):
    """One recording, whatever format it came in."""

    @property
    def id(self) -> str: ...

    @property
    def fps(self) -> float: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def action_space(self) -> ActionSpace: ...

    @property
    def actions(self) -> Actions: ...

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, (h w 3) uint8 RGB."""
        ...


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
    weight: float = 1.0  # how often each of its clips comes per epoch

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1000:  # an epoch's order is held in memory
            raise ValueError(f"weight={self.weight} of {self.path} must be a positive number, 1000 at most")


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
        return self._map(lambda tensor: tensor.to(device), self.ids)

    def __getitem__(self, rows: slice) -> "Batch":
        return self._map(lambda tensor: tensor[rows], self.ids[rows])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], ids: tuple[str, ...]) -> "Batch":
        visual, image_latents = (None if one is None else change(one) for one in (self.visual, self.image_latents))
        own = change(self.latents), change(self.keyboard), change(self.mouse)
        return Batch(*own, ids, visual, image_latents, self.skipped)


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the set."""

    url: str  # file name, beside the manifest
    clips: int
    bytes: int
    sha256: str
    episodes: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a shard set is; written last, so that its presence means that the set is complete."""

    game: GameConfig
    layout: Layout
    clip_frames: int  # pixel frames of one clip
    clip_latents: int  # latent frames of one clip
    latent_channels: int
    codec: str  # name of the codec
    codec_hash: str  # SHA-256 of its weights, first 12 hex digits
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    plan_hash: str  # over everything that decides what is in the shards
    split: str  # train or heldout
    vision: Vision = "none"  # CLIP tokens that the clips carry
    unknown: Unknown = "zeros"  # of the conditioning's latents that are not given; grey: the clips carry it
    shards: tuple[ShardInfo, ...] = field(default_factory=tuple)

    @property
    def clips(self) -> int:
        return sum(shard.clips for shard in self.shards)


def latent_ends(layout: Layout, latents: int) -> list[int]:
    """The last pixel frame that each of `latents` latent frames shows, counted from the clip's first frame.

    `continuous`: 0, 4, 8, 12, ...; `chunked` (9 frames encoded by themselves, 3 latents): 0, 4, 8, 9, 13, 17, ...
    """
    if layout == "continuous":
        return [4 * i for i in range(latents)]
    return [CHUNK_FRAMES * (i // CHUNK_LATENTS) + 4 * (i % CHUNK_LATENTS) for i in range(latents)]
