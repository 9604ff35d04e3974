"""Recording formats by name: each reader turns a folder and the game's config into an Episode."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_pipeline.readers.worldloom import find_episodes, read_episode
from data_pipeline.types import Episode, GameConfig
from data_pipeline.video import fit_frame

__all__ = ["READERS", "find_episodes", "read_game_frames", "split_episodes"]

T = TypeVar("T")

READERS: dict[str, Callable[[Path, GameConfig], Episode]] = {"worldloom": read_episode}


def split_episodes(episodes: Sequence[T], heldout_every: int) -> tuple[list[T], list[T]]:
    """Episodes to train on and episodes held out: every `heldout_every`-th is held out, none if it is 0."""
    if heldout_every < 0 or heldout_every == 1:
        raise ValueError(f"heldout_every must be 0 (hold out nothing) or at least 2, not {heldout_every}")
    heldout = [heldout_every > 0 and i % heldout_every == heldout_every - 1 for i in range(len(episodes))]
    train = [episode for episode, held in zip(episodes, heldout, strict=True) if not held]
    return train, [episode for episode, held in zip(episodes, heldout, strict=True) if held]


def read_game_frames(episode: Episode, game: GameConfig) -> Iterator[np.ndarray]:
    """Every frame in order, (h w 3) uint8 RGB, resized and cropped at the centre to the game's size."""
    for frame in episode.frames():
        yield fit_frame(frame, game.height, game.width)
