"""Episodes to clips: frames are cut into runs, batches of runs go through the codec, latents become clips."""

import io
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from configs.errors import UserError
from data_pipeline.plan import EncodeConfig, clip_starts
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.recording import BAD_RECORDING
from data_pipeline.types import Clip, Episode
from data_pipeline.video import to_video
from model.codec import Codec
from model.inputs import MASK_CHANNELS
from model.patch_codec import TEMPORAL
from model.vision import VisionTower, image_conditions, visual_context

T = TypeVar("T")


class BadEpisodeError(UserError):
    """An episode whose frames cannot be had."""

    def __init__(self, episode: str, error: Exception) -> None:
        super().__init__(str(error))
        self.episode = episode


JPEG_QUALITY = 95
AHEAD = 2  # batches of runs that are decoded before they are asked for


@dataclass(frozen=True)
class Encoder:
    """What makes latents of frames, and where."""

    codec: Codec
    tower: VisionTower | None
    config: EncodeConfig
    device: torch.device

    @torch.no_grad()
    def latents(self, frames: np.ndarray) -> torch.Tensor:
        """Normalised latents (b c f h w) in bfloat16 of frames (b n h w 3) uint8."""
        return self.codec.encode(to_video(torch.from_numpy(frames).to(self.device))).bfloat16().cpu()

    @torch.no_grad()
    def first_frame(self, frame: np.ndarray) -> "FirstFrame":
        """A clip's first frame (h w 3) uint8 as its JPEG and as what the model will be told of it."""
        visual = image_latents = None
        if self.tower is not None or self.config.unknown == "grey":
            image = to_video(torch.from_numpy(frame[None, None]).to(self.device))[:, :, 0]
            tokens = visual_context(self.tower, image, self.config.vision)
            visual = None if tokens is None else tokens[0].bfloat16().cpu()
            if self.config.unknown == "grey":
                cond = next(image_conditions(self.codec, image, 1 + (self.config.clip_frames - 1) // TEMPORAL))
                image_latents = cond[0, MASK_CHANNELS:].bfloat16().cpu()
        return FirstFrame(_jpeg(frame), visual, image_latents)


class FirstFrame(NamedTuple):
    """What a clip carries of its first frame; see Clip."""

    first_frame: bytes
    visual: torch.Tensor | None
    image_latents: torch.Tensor | None


class Run(NamedTuple):
    """Frames that the codec encodes in one go."""

    episode: int  # which of those at hand
    start: int  # frame of the episode
    frames: np.ndarray  # (n h w 3) uint8


def cut_episodes(episodes: Sequence[Episode], config: EncodeConfig) -> Iterator[list[Run]]:
    """Batches of the runs that the episodes' clips need, in order; a batch may hold runs of several episodes.

    Every episode is decoded to its end. Raises BadEpisodeError for one that cannot be.
    """

    def runs() -> Iterator[Run]:
        for i, episode in enumerate(episodes):
            wanted, frames = run_starts(config, len(episode.actions)), read_game_frames(episode, config.game)
            try:
                yield from (Run(i, *run) for run in cut_runs(frames, wanted, config.run_frames))
            except BAD_RECORDING as error:
                raise BadEpisodeError(episode.id, error) from error

    every = runs()
    return iter(lambda: list(islice(every, config.batch)), [])


def run_starts(config: EncodeConfig, frames: int) -> list[int]:
    """Where the runs begin that the clips of an episode of so many frames need; clips share them."""
    return sorted({start + offset for start in clip_starts(config, frames) for offset in _offsets(config)})


def cut_runs(frames: Iterator[np.ndarray], starts: Sequence[int], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """The runs (n h w c) of `length` frames that begin at the ascending `starts`, holding one run at a time."""
    wanted, window = deque(starts), deque(maxlen=length)
    for i, frame in enumerate(frames):
        window.append(frame)
        if wanted and i + 1 - length == wanted[0]:
            yield wanted.popleft(), np.stack(window)


def encode_clips(encoder: Encoder, episodes: Sequence[Episode], batches: Iterable[list[Run]]) -> Iterator[Clip]:
    """The episodes' clips in order; each run of frames is encoded once, however many clips share it."""
    config, offsets = encoder.config, _offsets(encoder.config)
    clips = deque((i, start) for i, one in enumerate(episodes) for start in clip_starts(config, len(one.actions)))
    begins = set(clips)
    latents: dict[tuple[int, int], torch.Tensor] = {}  # by episode and first frame of the run
    first_frames: dict[tuple[int, int], FirstFrame] = {}
    for batch in batches:
        places = [(run.episode, run.start) for run in batch]
        encoded = encoder.latents(np.stack([run.frames for run in batch]))
        if not torch.isfinite(encoded).all():
            names = dict.fromkeys(episodes[run.episode].id for run in batch)
            raise UserError(f"codec={config.codec} makes latents of {', '.join(names)} that are not finite numbers")
        latents.update(zip(places, encoded, strict=True))
        pictures = {place: run.frames[0] for place, run in zip(places, batch, strict=True) if place in begins}
        first_frames.update((place, encoder.first_frame(frame)) for place, frame in pictures.items())
        while clips and (clips[0][0], clips[0][1] + offsets[-1]) in latents:
            i, start = clips.popleft()
            rows = episodes[i].actions[start : start + config.clip_frames]
            yield Clip(
                latents=torch.cat([latents[i, start + offset] for offset in offsets], dim=1),
                keyboard=torch.from_numpy(rows.keyboard),
                mouse=torch.from_numpy(rows.mouse),
                episode=episodes[i].id,
                start=start,
                **first_frames.pop((i, start))._asdict(),
            )
        if not clips:
            return  # before the next batch is asked for: it may be another shard's, and long in coming
        for done in [place for place in latents if place < clips[0]]:
            del latents[done]


def read_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; a thread makes the next ones while one is used. Closing it ends the thread."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        upcoming: deque[Future[T | object]] = deque(pool.submit(next, items, end) for _ in range(AHEAD))
        try:
            while (item := upcoming.popleft().result()) is not end:
                upcoming.append(pool.submit(next, items, end))
                yield cast(T, item)
        finally:
            for future in upcoming:
                future.cancel()


def _offsets(config: EncodeConfig) -> range:
    """Where a clip's runs begin, in frames from its first."""
    return range(0, config.clip_frames, config.run_frames)


def _jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()
