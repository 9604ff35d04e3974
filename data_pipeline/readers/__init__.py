"""Recording formats by name: each finds the recordings of a source and reads them into episodes of a game."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers.recording import RATE_TOLERANCE, Format, Recording, recording_of
from data_pipeline.resample import resample
from data_pipeline.types import Episode
from data_pipeline.video import fit_frame, frame_times, kept_share

__all__ = [
    "KEPT_WELL", "READERS", "Reader", "Recording", "count_cut", "describe_crop", "find_recordings", "kept_share",
    "read_game_frames", "recording_of", "split_episodes",
]  # fmt: skip

T = TypeVar("T")
KEPT_WELL = 0.9  # of a picture that is cropped to the game's proportions: less is said
# A format is the module of that name in this folder, whose FORMAT says what it needs, and its name here.
Reader = Literal[
    "worldloom", "frames", "vpt", "gf_minecraft", "csgo", "lerobot", "owl_control", "event_log", "fastvideo", "table"
]
READERS: dict[Reader, Format] = {name: import_module(f"{__name__}.{name}").FORMAT for name in get_args(Reader)}


def find_recordings(reader: Reader, source: str | Path) -> list[Recording]:
    """The recordings in `source`, by name; little is read of them yet. Their episodes have the game's rate."""
    found = READERS[reader].find(source)
    return [recording._replace(read=partial(_read_at_rate, reader, recording, str(source))) for recording in found]


def _read_at_rate(reader: Reader, recording: Recording, source: str, game: GameConfig) -> Sequence[Episode]:
    _require_utf8(f"{source}/{recording.name}")
    inputs, recorded_fps = game.inputs, game.inputs.fps or game.fps
    if READERS[reader].scaled_mouse and game.action_space.mouse and not (inputs.pitch_deg and inputs.yaw_deg):
        how = "the degrees up and right of one recorded unit (of a pixel: pitch_deg < 0, since y counts downwards)"
        raise UserError(f"reader={reader}: set game.inputs.pitch_deg and game.inputs.yaw_deg, {how}")
    episodes = recording.read(replace(game, fps=recorded_fps))
    if inputs.times == "resample":
        return [resample(episode, game.fps, recorded_fps, _times_of(episode, game)) for episode in episodes]
    if recorded_fps == game.fps:
        return episodes
    return [resample(episode, game.fps, recorded_fps) for episode in episodes]


def _require_utf8(name: str) -> None:
    """Raises UserError for a name that neither JSON nor a shard can hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name!r} is no name in UTF-8; rename it, or set LC_ALL=C.UTF-8 if it looks right") from error


def _times_of(episode: Episode, game: GameConfig) -> np.ndarray:
    """When each frame is shown, (n) seconds. Raises UserError if nothing says so, or if they are too few."""
    video = episode.footage.path
    if not episode.footage.is_video:
        raise UserError(f"{video} is no video that says when its frames are shown; set game.inputs.times=even")
    times = frame_times(video)[episode.first : episode.stop]
    fps = (len(times) - 1) / max(float(np.ptp(times)), 1e-9) if len(times) > 1 else game.fps
    if fps < (1 - RATE_TOLERANCE) * game.fps:
        raise UserError(f"{video} has {fps:.4g} frames a second, which is less than game.fps={game.fps:g}; lower it")
    return times


def count_cut(episodes: Sequence[Episode]) -> int:
    """Frames of a recording, as recorded, that are in none of its `episodes`."""
    recorded = max((episode.footage.frames for episode in episodes), default=0)
    return max(0, recorded - sum(episode.stop - episode.first for episode in episodes))


def split_episodes(recordings: Sequence[T], heldout_every: int) -> tuple[list[T], list[T]]:
    """Recordings to train on and recordings held out: every `heldout_every`-th is held out, none if it is 0.

    Those of one session count as one.
    """
    if heldout_every < 0 or heldout_every == 1:
        raise UserError(f"heldout_every must be 0 (hold out nothing) or at least 2, not {heldout_every}")
    sessions = [each.session or each.name if isinstance(each, Recording) else each for each in recordings]
    chosen = set(list(dict.fromkeys(sessions))[heldout_every - 1 :: heldout_every] if heldout_every else [])
    paired = list(zip(recordings, sessions, strict=True))
    train = [recording for recording, session in paired if session not in chosen]
    return train, [recording for recording, session in paired if session in chosen]


def read_game_frames(episode: Episode, game: GameConfig) -> Iterator[np.ndarray]:
    """Every frame in order, (h w 3) uint8 RGB, resized and cropped at the centre to the game's size."""
    for frame in episode.frames():
        yield fit_frame(frame, game.height, game.width)


def describe_crop(episodes: Sequence[Episode], game: GameConfig) -> str:
    """One line that says how much of their pictures is kept in the game's size; empty if nearly all is."""
    sizes = Counter((episode.footage.height, episode.footage.width) for episode in episodes)
    shares = {size: kept_share(size, game.height, game.width) for size in sizes}
    cropped = sorted((size for size in sizes if shares[size] < KEPT_WELL), key=lambda size: shares[size])
    if not cropped:
        return ""
    parts = [f"of {h}x{w} px {shares[h, w]:.0%} is kept ({sizes[h, w]} episodes)" for h, w in cropped[:3]]
    more = f", and of {len(cropped) - 3} other sizes more" if len(cropped) > 3 else ""
    return f"pictures are cropped at the centre to {game.height}x{game.width} px: {', '.join(parts)}{more}"
