"""Synthetic recordings, written by the recorder's own writer."""

import cv2
import numpy as np

from data_pipeline.readers.worldloom import describe_episode, write_episode

EPISODES, FRAMES = 6, 30


def draw_frames(game, frames, seed):
    """A walk along a painted wall: frames (n h w 3) uint8, keyboard (n k), mouse (n 2) degrees; a degree is a pixel."""
    rng = np.random.default_rng(seed)
    wall = cv2.resize(rng.integers(0, 256, (8, 64, 3), dtype=np.uint8), (16 * game.width, game.height))
    keyboard = rng.integers(0, 2, (frames, len(game.action_space.keys)))
    mouse_deg = np.stack([np.zeros(frames), rng.integers(-3, 4, frames)], axis=1)
    places = 8 * game.width + np.concatenate([[0], np.cumsum(mouse_deg[:-1, 1])]).astype(int)
    return np.stack([wall[:, place : place + game.width] for place in places]), keyboard, mouse_deg


def write_recording(folder, game, frames=FRAMES, seed=0):
    """One episode folder."""
    pictures, keyboard, mouse_deg = draw_frames(game, frames, seed)
    write_episode(folder, {**describe_episode(game, frames), "seed": seed}, pictures, keyboard, mouse_deg)
