"""The settings of `python -m sampling play`, and the pictures that a world can be started from."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from configs import storage, within
from configs.errors import UserError
from configs.game import GameConfig
from configs.overrides import read_settings
from data_pipeline.pictures import decode_picture, read_picture
from data_pipeline.readers.keys import MOST_DEG
from data_pipeline.shards import load_manifest, read_entries, shard_url
from data_pipeline.video import fit_frame
from model.limits import Precision
from model.world import WorldModelConfig
from sampling.config import SamplingConfig
from sampling.denoising import Denoising
from sampling.generate import read_prompt
from sampling.live.recording import MOST_FRAMES

STARTS = "starts"  # a folder of PNGs in a checkpoint or beside it
MOST_STARTS = 12  # pictures of the gallery


@dataclass(frozen=True, kw_only=True)
class PlayConfig(SamplingConfig):
    """`python -m sampling play <checkpoint>`."""

    prompt: str = ""  # a picture, or a video whose first frame is taken; without it the checkpoint's own ones
    host: str = "127.0.0.1"  # any other address than loopback makes a token that the url must hold
    port: int = within(0, 65535, 8000)  # 0: any that is free
    browser: bool = False  # open the page where there is a screen
    sessions: int = within(1, 64, 4)  # players at once; the next one waits in line
    idle_s: float = within(1, 86400, 300.0)  # a player who touches nothing for so long makes room
    keep_s: float = within(0, 86400, 60.0)  # a world is kept for so long after its page went away
    precision: Precision = "auto"  # of the DiT's weights; auto: the faster one here, which is recorded
    steps: int = 4  # Euler steps per chunk or block, until the player changes them
    few_steps: tuple[int, ...] = ()  # causal models: instead of steps the list of a few-step model: [1000,666,333]
    context_noise: float | None = None  # causal models: noise of finished blocks in the caches; null: the model's own
    mouse_limit_deg: float = within(0.01, MOST_DEG, 4.5)  # degrees per frame; a faster mouse turns no faster
    record: str = ""  # folder for episodes that players record; without it they download them
    script: str = ""  # plays these actions without a server, as `generate` takes them, and records them
    frames: int = within(1, MOST_FRAMES, 105)  # of the script

    def __post_init__(self) -> None:
        _ = self.denoising  # checks of its own
        if bool(self.script) > bool(self.record):
            raise UserError("script= plays without a page, so it needs record=<folder> for the episode")
        if not math.isfinite(self.mouse_deg) or abs(self.mouse_deg) > MOST_DEG:
            raise UserError(f"mouse_deg={self.mouse_deg} must lie between -{MOST_DEG:g} and {MOST_DEG:g}")

    @property
    def denoising(self) -> Denoising:
        return Denoising(self.steps, self.few_steps, self.context_noise, self.guidance)


def read_starts(checkpoint: str, world: WorldModelConfig, config: PlayConfig) -> list[np.ndarray]:
    """Pictures (h w 3) uint8 of the game's size to start from: `prompt`, else the PNGs of the folder `starts` in or
    beside the checkpoint, else first frames of the episodes that its training held out. UserError without any."""
    if config.prompt:
        return [read_prompt(config.prompt, 0, world.game)[0]]
    for folder in (storage.join(checkpoint, STARTS), storage.join(storage.parent(checkpoint), STARTS)):
        names = sorted(name for name in storage.list_folder(folder) if name.lower().endswith(".png"))
        if names:
            pictures = [read_picture(storage.join(folder, name)) for name in names[:MOST_STARTS]]
            return [fit_frame(picture, world.game.height, world.game.width) for picture in pictures]
    pictures = list(islice(_heldout_frames(checkpoint, world.game), MOST_STARTS))
    if not pictures:
        raise UserError(f"{checkpoint} has no {STARTS}/*.png and no held-out shards here: give prompt=<picture>")
    return pictures


def _heldout_frames(checkpoint: str, game: GameConfig) -> Iterator[np.ndarray]:
    """The first picture of every episode of the shards that the run of `checkpoint` was validated on, if they are
    here."""
    file = storage.join(checkpoint, "config.yaml")
    settings = read_settings(storage.local(file)) if storage.exists(file) else {}
    manifest = str(dict(settings.get("validation") or {}).get("manifest") or "")
    if not manifest or storage.is_s3(manifest) or not storage.exists(manifest):
        return
    for info in load_manifest(manifest).shards:
        url, seen = shard_url(manifest, info), set[str]()
        for entry in read_entries(url, info):
            if entry.episode not in seen:
                seen.add(entry.episode)
                picture = decode_picture(storage.read_range(url, entry.jpeg_offset, entry.jpeg_size), url)
                yield fit_frame(picture, game.height, game.width)
