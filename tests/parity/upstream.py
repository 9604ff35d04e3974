"""What Matrix-Game 2.0's own demo shows of actions, and how it replaces them live: for its recorded outputs alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs import load_config
from configs.game import ActionSpace, GameConfig
from data_pipeline.overlay import active_keys
from data_pipeline.types import Actions

GAMES = Path(__file__).parents[2] / "configs" / "games"
RELEASED = ("universal", "gta_drive", "templerun")
CURSOR_START_PX = (320.0, 176.0)  # (x, y): the middle of 640 x 352
CURSOR_PX_PER_UNIT = (1.5, -6.0)  # x per yaw, y per pitch


@dataclass(frozen=True)
class GameFile:
    """What a YAML file of configs/games holds."""

    game: GameConfig


def released_game(name: str) -> GameConfig:
    """The game in configs/games/<name>.yaml."""
    return load_config(GameFile, [str(GAMES / f"{name}.yaml")]).game


def released_space(name: str) -> ActionSpace:
    """Its action space."""
    return released_game(name).action_space


def live_rows(start: int, block: int, frames_per_latent: int = 4) -> slice:
    """The pixel frames whose actions a live player decides before latents `start` ... `start + block - 1` are made."""
    end = 1 + frames_per_latent * (start + block - 1)
    first = 0 if start == 0 else end - frames_per_latent * block
    return slice(first, end)


def replace_rows(
    actions: Actions, rows: slice, keyboard: np.ndarray | None = None, mouse: np.ndarray | None = None
) -> Actions:
    """`actions` with the same keys (k) and mouse movement (2) held in all of `rows`; None leaves what was there."""
    new_keyboard, new_mouse = actions.keyboard.copy(), actions.mouse.copy()
    if keyboard is not None:
        new_keyboard[rows] = keyboard
    if mouse is not None:
        new_mouse[rows] = mouse
    return Actions(new_keyboard, new_mouse)


def cursor_path(mouse: np.ndarray) -> np.ndarray:
    """Where upstream's overlay draws the cursor: (x, y) px (n 2) of each frame, of rows of mouse (n 2) in (pitch, yaw).

    It stands in the middle at frame 0, whatever row 0 says; row i moves it between frames i - 1 and i.
    """
    moves = mouse[:, ::-1].astype(np.float32) * np.array(CURSOR_PX_PER_UNIT, np.float32)
    moves[:1] = CURSOR_START_PX
    return np.cumsum(moves, axis=0, dtype=np.float32)  # upstream's sum is fp32 too


def lit_keys(game: str, actions: Actions) -> np.ndarray:
    """Which caps upstream's overlay lights (n caps): W, A, S, D, and for templerun left and right, 0 or 1."""
    lit = active_keys(released_space(game), actions)
    order = [label for label in ("W", "A", "S", "D", "left", "right") if label in lit]
    return np.stack([lit[label] for label in order], axis=1).astype(np.float32)
