"""Synthetic recordings, written by the recorder's own writer."""

from pathlib import Path

import cv2
import numpy as np
from tiny_videos import change_packets

from data_pipeline.readers.worldloom import describe_episode, write_episode
from data_pipeline.types import Actions, Episode, Footage

EPISODES, FRAMES = 6, 30


def draw_frames(game, frames, seed):
    """A walk along a painted wall: frames (n h w 3) uint8, keyboard (n k), mouse (n 2) degrees; a degree is a pixel."""
    rng = np.random.default_rng(seed)
    wall = cv2.resize(rng.integers(0, 256, (8, 64, 3), dtype=np.uint8), (16 * game.width, game.height))
    keyboard = rng.integers(0, 2, (frames, len(game.action_space.keys)))
    mouse_deg = np.stack([np.zeros(frames), rng.integers(-3, 4, frames)], axis=1)
    starts = 8 * game.width + np.concatenate([[0], np.cumsum(mouse_deg[:-1, 1])]).astype(int)
    return np.stack([wall[:, start : start + game.width] for start in starts]), keyboard, mouse_deg


def write_recording(folder, game, frames=FRAMES, seed=0):
    """One episode folder."""
    pictures, keyboard, mouse_deg = draw_frames(game, frames, seed)
    write_episode(folder, {**describe_episode(game, frames), "seed": seed}, pictures, keyboard, mouse_deg)


def numbered_episode(keyboard):
    """An episode whose frames carry their number; its mouse moves by 1 in each."""
    frames = len(keyboard)
    footage = Footage(Path("e"), frames, 1, 1, lambda start, stop: (np.full((1, 1, 3), i) for i in range(start, stop)))
    return Episode("e", Actions(keyboard, np.ones((frames, 2), np.float32)), footage, 0, frames)


def end_early(folder, share=0.7):
    """Cuts the video of an episode; what is in front of it still promises all frames."""
    video = folder / "video.mp4"
    change_packets(video, options={"movflags": "faststart"})
    data = video.read_bytes()
    video.write_bytes(data[: int(share * len(data))])


def spoil_video(folder):
    """Wipes out a part in the middle of an episode's pictures, which only a decoder sees."""
    video = folder / "video.mp4"
    change_packets(video)
    data = bytearray(video.read_bytes())
    middle = (data.index(b"mdat") + data.rindex(b"moov")) // 2
    data[middle : middle + 300] = bytes(300)
    video.write_bytes(data)
