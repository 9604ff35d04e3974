"""Recording formats by name: each finds the recordings of a source and reads them into episodes of a game."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers import (
    csgo,
    event_log,
    fastvideo,
    frames,
    gf_minecraft,
    lerobot,
    owl_control,
    table,
    vpt,
    worldloom,
)
from data_pipeline.readers.recording import RATE_TOLERANCE, Recording, VideoEpisode, recording_of, require_text_name
from data_pipeline.resample import ResampledEpisode
from data_pipeline.types import Episode
from data_pipeline.video import fit_frame, frame_times, kept_share

__all__ = [
    "KEPT_WELL", "READERS", "Reader", "Recording", "count_cut", "describe_crop", "find_recordings", "kept_share",
    "read_game_frames", "recording_of", "split_episodes",
]  # fmt: skip

T = TypeVar("T")
KEPT_WELL = 0.9  # of a picture that is cropped to the game's proportions: less is said
Reader = Literal[
    "worldloom", "frames", "vpt", "gf_minecraft", "csgo", "lerobot", "owl_control", "event_log", "fastvideo", "table"
]

READERS: dict[Reader, Callable[[str | Path], list[Recording]]] = {
    "worldloom": worldloom.find_recordings,
    "frames": frames.find_recordings,
    "vpt": vpt.find_recordings,
    "gf_minecraft": gf_minecraft.find_recordings,
    "csgo": csgo.find_recordings,
    "lerobot": lerobot.find_recordings,
    "owl_control": owl_control.find_recordings,
    "event_log": event_log.find_recordings,
    "fastvideo": fastvideo.find_recordings,
    "table": table.find_recordings,
}


def find_recordings(reader: Reader, source: str | Path) -> list[Recording]:
    """The recordings in `source`, by name; little is read of them yet. Their episodes have the game's rate."""
    return [one._replace(read=partial(_read_at_rate, one, str(source))) for one in READERS[reader](source)]


def _read_at_rate(recording: Recording, source: str, game: GameConfig) -> Sequence[Episode]:
    require_text_name(f"{source}/{recording.name}")
    inputs = game.inputs
    recorded = recording.read(game if inputs.fps is None else replace(game, fps=inputs.fps))
    if inputs.times == "resample":
        return [ResampledEpisode(episode, game.fps, _times_of(episode, game)) for episode in recorded]
    if inputs.fps is None or inputs.fps == game.fps:
        return recorded
    return [ResampledEpisode(episode, game.fps) for episode in recorded]


def _times_of(episode: Episode, game: GameConfig) -> np.ndarray:
    """When each frame is shown, (n) seconds. Raises ValueError if nothing says so, or if they are too few."""
    if not isinstance(episode, VideoEpisode):
        raise UserError(f"{episode.id} has no video that says when its frames are shown; set game.inputs.times=even")
    times = frame_times(episode.video)[episode.first : episode.first + len(episode.actions)]
    fps = (len(times) - 1) / max(float(np.ptp(times)), 1e-9) if len(times) > 1 else game.fps
    if fps < (1 - RATE_TOLERANCE) * game.fps:
        raise UserError(
            f"{episode.video} has {fps:.4g} frames a second, the game {game.name!r} {game.fps:g}: frames can be left "
            "out, not invented; set game.fps"
        )
    return times


def count_cut(episodes: Sequence[Episode]) -> int:
    """Frames of a recording, as recorded, that are in none of its `episodes`; 0 where its reader does not say."""
    recorded = [one.recorded if isinstance(one, ResampledEpisode) else one for one in episodes]
    videos = [one for one in recorded if isinstance(one, VideoEpisode) and one.recorded is not None]
    whole = max((one.recorded or 0 for one in videos), default=0)
    return max(0, whole - sum(len(one.actions) for one in videos))


def split_episodes(recordings: Sequence[T], heldout_every: int) -> tuple[list[T], list[T]]:
    """Recordings to train on and recordings held out: every `heldout_every`-th is held out, none if it is 0.

    Those of one session count as one.
    """
    if heldout_every < 0 or heldout_every == 1:
        raise UserError(f"heldout_every must be 0 (hold out nothing) or at least 2, not {heldout_every}")
    sessions = [one.session or one.name if isinstance(one, Recording) else one for one in recordings]
    chosen = set(list(dict.fromkeys(sessions))[heldout_every - 1 :: heldout_every] if heldout_every else [])
    heldout = [session in chosen for session in sessions]
    train = [recording for recording, held in zip(recordings, heldout, strict=True) if not held]
    return train, [recording for recording, held in zip(recordings, heldout, strict=True) if held]


def read_game_frames(episode: Episode, game: GameConfig) -> Iterator[np.ndarray]:
    """Every frame in order, (h w 3) uint8 RGB, resized and cropped at the centre to the game's size."""
    for frame in episode.frames():
        yield fit_frame(frame, game.height, game.width)


def describe_crop(episodes: Sequence[Episode], game: GameConfig) -> str:
    """One line that says how much of their pictures is kept in the game's size; none if nearly all is."""
    sizes = Counter((episode.height, episode.width) for episode in episodes)
    shares = {size: kept_share(size, game.height, game.width) for size in sizes}
    cropped = sorted((size for size in sizes if shares[size] < KEPT_WELL), key=lambda size: shares[size])
    if not cropped:
        return ""
    said = [f"of {h}x{w} px {shares[h, w]:.0%} is kept ({sizes[h, w]} episodes)" for h, w in cropped[:3]]
    more = f", and of {len(cropped) - 3} other sizes more" if len(cropped) > 3 else ""
    return f"pictures are cropped at the centre to {game.height}x{game.width} px: {', '.join(said)}{more}"
