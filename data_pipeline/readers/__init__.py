"""Recording formats by name: each finds the recordings of a source and reads them into episodes of a game."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers.recording import RATE_TOLERANCE, Format, Recording, list_names
from data_pipeline.resample import resample
from data_pipeline.types import Episode
from data_pipeline.video import fit_frame, frame_times, kept_share

KEPT_WELL = 0.9  # of a picture that is cropped to the game's proportions: less is said
Reader = Literal[
    "worldloom", "frames", "vpt", "gf_minecraft", "csgo", "lerobot", "owl_control", "event_log", "fastvideo", "table"
]


def find_recordings(reader: Reader, source: str | Path) -> list[Recording]:
    """The recordings in `source`, by name; little is read of them yet. Their episodes have the game's rate.

    A format is the module of that name in this folder, whose FORMAT says how recordings are found and read.
    """
    try:
        module = import_module(f"{__name__}.{reader}")
    except ImportError as error:  # of an optional package
        raise UserError(f"reader={reader} needs {error.name}: pip install 'worldloom[readers]'") from error
    form: Format = module.FORMAT
    files = form.find(source)
    if not files:
        raise UserError(f"{source} holds no recordings for reader={reader}. {(module.__doc__ or '').splitlines()[0]}")
    recordings = []
    for name in sorted(files):
        part = form.session.fullmatch(name) if form.session else None
        read = partial(_read_at_rate, f"{source}/{name}", partial(form.read, name, files[name]))
        recordings.append(Recording(name, read, part[1] if part else name))
    return recordings


def _read_at_rate(path: str, read: Callable[[GameConfig], Sequence[Episode]], game: GameConfig) -> Sequence[Episode]:
    try:
        path.encode()  # neither JSON nor a shard can hold another name
    except UnicodeEncodeError as error:
        raise UserError(f"{path!r} is no name in UTF-8; rename it, or set LC_ALL=C.UTF-8 if it looks right") from error
    recorded_fps = game.inputs.fps or game.fps
    episodes = read(replace(game, fps=recorded_fps))
    if game.inputs.times == "resample":
        return [resample(episode, game.fps, recorded_fps, _times_of(episode, game)) for episode in episodes]
    return episodes if recorded_fps == game.fps else [resample(each, game.fps, recorded_fps) for each in episodes]


def _times_of(episode: Episode, game: GameConfig) -> np.ndarray:
    """When each frame is shown, (n) seconds."""
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


def split_episodes(recordings: Sequence[Recording], heldout_every: int) -> tuple[list[Recording], list[Recording]]:
    """Recordings to train on, and those of every `heldout_every`-th session, which are held out; none if it is 0."""
    if heldout_every < 0 or heldout_every == 1:
        raise UserError(f"heldout_every must be 0 (hold out nothing) or at least 2, not {heldout_every}")
    sessions = list(dict.fromkeys(recording.session for recording in recordings))
    heldout = set(sessions[heldout_every - 1 :: heldout_every]) if heldout_every else set()
    train = [recording for recording in recordings if recording.session not in heldout]
    return train, [recording for recording in recordings if recording.session in heldout]


def read_game_frames(episode: Episode, game: GameConfig) -> Iterator[np.ndarray]:
    """Every frame in order, (h w 3) uint8 RGB, resized and cropped at the centre to the game's size."""
    for frame in episode.frames():
        yield fit_frame(frame, game.height, game.width)


def describe_crop(episodes: Sequence[Episode], game: GameConfig) -> str:
    """One line that says how much of their pictures is kept in the game's size; empty if nearly all is."""
    sizes = Counter((episode.footage.height, episode.footage.width) for episode in episodes)
    shares = sorted((kept_share(size, game.height, game.width), size) for size in sizes)
    cropped = [(kept, size) for kept, size in shares if kept < KEPT_WELL]
    parts = [f"of {h}x{w} px {kept:.0%} is kept ({sizes[h, w]} episodes)" for kept, (h, w) in cropped]
    what = f"pictures are cropped at the centre to {game.height}x{game.width} px"
    return f"{what}: {list_names(parts)}" if parts else ""
