"""Episodes to clips: frames are cut into runs, the codec encodes batches of runs, latents become clips."""

import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from configs.errors import UserError
from data_pipeline.plan import EncodeConfig, clip_starts
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.recording import BAD_RECORDING
from data_pipeline.shards import count_latents
from data_pipeline.types import Clip, Episode
from data_pipeline.video import to_video
from model.codec import Codec
from model.inputs import MASK_CHANNELS
from model.vision import VisionTower, image_conditions, image_tokens

JPEG_QUALITY = 95


class BadEpisodeError(UserError):
    """An episode whose frames cannot be decoded."""

    def __init__(self, episode: str, error: Exception) -> None:
        super().__init__(str(error))
        self.episode = episode


@dataclass(frozen=True)
class Encoder:
    """The codec and the vision tower, on a device."""

    codec: Codec
    tower: VisionTower | None
    config: EncodeConfig
    device: torch.device

    @torch.no_grad()
    def latents(self, frames: np.ndarray) -> torch.Tensor:
        """Normalised latents (b c f h w) in bfloat16 of frames (b n h w 3) uint8."""
        return self.codec.encode(to_video(torch.from_numpy(frames).to(self.device))).bfloat16().cpu()

    @torch.no_grad()
    def first_frame(self, frame: np.ndarray) -> dict[str, Any]:
        """What a clip holds of its first frame (h w 3) uint8: `first_frame`, `visual` and `image_latents` of Clip."""
        file, visual, image_latents = io.BytesIO(), None, None
        Image.fromarray(frame).save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        if self.tower is not None or self.config.unknown == "grey":
            image = to_video(torch.from_numpy(frame[None, None]).to(self.device))[:, :, 0]
            tokens = image_tokens(self.tower, image, self.config.vision)
            visual = None if tokens is None else tokens[0].bfloat16().cpu()
            if self.config.unknown == "grey":
                latents = count_latents(self.config.layout, self.config.clip_frames, self.codec.config.temporal)
                cond = next(image_conditions(self.codec, image, latents))
                image_latents = cond[0, MASK_CHANNELS:].bfloat16().cpu()
        return {"first_frame": file.getvalue(), "visual": visual, "image_latents": image_latents}


class Run(NamedTuple):
    """Frames that the codec encodes at once."""

    episode: int  # its index among the shard's episodes
    start: int  # frame of the episode
    frames: np.ndarray  # (n h w 3) uint8


def cut_episodes(episodes: Sequence[Episode], config: EncodeConfig) -> Iterator[Run]:
    """The runs that the episodes' clips need, in order.

    Every episode is decoded to its end. Raises BadEpisodeError for one that cannot be.
    """
    for i, episode in enumerate(episodes):
        starts, frames = run_starts(config, len(episode.actions)), read_game_frames(episode, config.game)
        try:
            for start, run in cut_runs(frames, starts, config.run_frames):
                yield Run(i, start, run)
        except BAD_RECORDING as error:
            raise BadEpisodeError(episode.id, error) from error


def run_starts(config: EncodeConfig, frames: int) -> list[int]:
    """The first frames of the runs that the clips of an episode of `frames` frames need; clips share runs."""
    offsets = range(0, config.clip_frames, config.run_frames)
    return sorted({start + offset for start in clip_starts(config, frames) for offset in offsets})


def cut_runs(frames: Iterator[np.ndarray], starts: Sequence[int], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """The runs (n h w c) of `length` frames that begin at the ascending `starts`, holding one run at a time."""
    wanted, window = deque(starts), deque(maxlen=length)
    for i, frame in enumerate(frames):
        window.append(frame)
        if wanted and i + 1 - length == wanted[0]:
            yield wanted.popleft(), np.stack(window)
    if wanted:
        raise UserError(f"there are no {length} frames from frame {wanted[0]} on")


def encode_clips(encoder: Encoder, episodes: Sequence[Episode], runs: Iterator[Run]) -> Iterator[Clip]:
    """The episodes' clips in order; each run of frames is encoded once, however many clips share it."""
    config, offsets = encoder.config, range(0, encoder.config.clip_frames, encoder.config.run_frames)
    clips = deque((i, start) for i, it in enumerate(episodes) for start in clip_starts(config, len(it.actions)))
    first_frames: dict[tuple[int, int], dict[str, Any]] = {clip: {} for clip in clips}
    latents: dict[tuple[int, int], torch.Tensor] = {}  # by episode and first frame of the run
    while batch := list(islice(runs, config.batch)):  # a batch may hold runs of several episodes
        encoded = encoder.latents(np.stack([run.frames for run in batch]))
        if not torch.isfinite(encoded).all():
            names = ", ".join(dict.fromkeys(episodes[run.episode].id for run in batch))
            raise UserError(f"codec={config.codec} makes latents of {names} that are not finite numbers")
        for (i, start, frames), of_run in zip(batch, encoded, strict=True):
            latents[i, start] = of_run
            if (i, start) in first_frames:
                first_frames[i, start] = encoder.first_frame(frames[0])
        while clips and (clips[0][0], clips[0][1] + offsets[-1]) in latents:
            i, start = clips.popleft()
            actions = episodes[i].actions[start : start + config.clip_frames]
            yield Clip(
                latents=torch.cat([latents[i, start + offset] for offset in offsets], dim=1),
                keyboard=torch.from_numpy(actions.keyboard),
                mouse=torch.from_numpy(actions.mouse),
                episode=episodes[i].id,
                start=start,
                **first_frames.pop((i, start)),
            )
        latents = {run: of_run for run, of_run in latents.items() if clips and run >= clips[0]}
