"""A recording format of one's own: videos alone; in the first half of each, `forward` is held."""

from pathlib import Path

import numpy as np

from configs.game import GameConfig
from data_pipeline.readers.keys import bind_keys, mouse_rows
from data_pipeline.readers.recording import VIDEOS, Format, cut_episodes, list_files, open_video
from data_pipeline.types import Actions, Episode


def find_videos(source: str | Path) -> dict[str, Path]:
    return {video.stem: video for video in list_files(source, *VIDEOS)}


def read_video(name: str, video: Path, game: GameConfig) -> list[Episode]:
    footage, keys = open_video(video, game), bind_keys(game, ["forward"])
    held = np.arange(footage.frames)[:, None] < footage.frames // 2
    keyboard = keys.rows(["forward"], held, lambda i: f"{video} frame {i}")
    return cut_episodes(name, footage, Actions(keyboard, mouse_rows(game.action_space, np.zeros((len(held), 2)))))


FORMAT = Format(find_videos, read_video)
