"""Random play out of a table of presets, live replacement of actions, and what an overlay shows of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from data_pipeline.types import Actions

SEGMENT_FRAMES = 12  # how long one preset is held
CAMERA_STEP = 0.1  # what upstream's presets put into the mouse vector
CURSOR_START_PX = (320.0, 176.0)  # (x, y): the middle of 640 x 352
CURSOR_PX_PER_UNIT = (1.5, -6.0)  # x per yaw, y per pitch


@dataclass(frozen=True)
class Preset:
    """Keys and mouse movement that are held together; a table may name one several times to make it likelier."""

    name: str
    keyboard: tuple[float, ...]
    mouse: tuple[float, ...] = ()  # (pitch, yaw); empty in an action space without a mouse


def preset_actions(
    entries: Sequence[Preset], frames: int, seed: int | random.Random, segment: int = SEGMENT_FRAMES
) -> Actions:
    """`frames` rows of play: one entry in frame 0, then one per `segment` frames, drawn uniformly from `entries`.

    The draws are those of Matrix-Game 2.0's sampler: the same seed of Python's `random` gives the same play.
    """
    if not entries or frames < 1 or segment < 1:
        raise ValueError(f"random play needs presets ({len(entries)}), frames ({frames}) and a segment ({segment})")
    rng = random.Random(seed) if isinstance(seed, int) else seed
    drawn: list[Preset] = []
    while len(drawn) < frames:
        rng.randint(0, 0)  # upstream picks one of one group first, and that consumes random numbers
        entry = entries[rng.randint(0, len(entries) - 1)]
        drawn += [entry] * (segment if drawn else 1)
    keyboard = np.array([entry.keyboard for entry in drawn[:frames]], np.float32)
    return Actions(keyboard, np.array([entry.mouse for entry in drawn[:frames]], np.float32))


def together(*presets: Preset) -> Preset:
    """Several presets held at once."""
    keyboard = np.sum([preset.keyboard for preset in presets], axis=0)
    mouse = np.sum([preset.mouse for preset in presets], axis=0)
    return Preset("_".join(preset.name for preset in presets), tuple(keyboard.tolist()), tuple(mouse.tolist()))


def universal_presets() -> list[Preset]:
    """Upstream's 45 entries for keys forward, back, left, right and a mouse; never back, never up or down."""
    forward, _, left, right = (
        Preset(name, row, (0.0, 0.0))
        for name, row in zip(("forward", "back", "left", "right"), _one_hot(4), strict=True)
    )
    cameras = _cameras(4)
    diagonals = [together(forward, left), together(forward, right)]
    moves = [forward, left, right]
    mixed = [together(move, camera) for move, camera in product(moves + diagonals, cameras)]
    return diagonals * 5 + cameras * 5 + moves * 5 + mixed


def gta_drive_presets() -> list[Preset]:
    """Upstream's 12 entries for keys forward, back and steering by the mouse."""
    moves = [Preset(name, row, (0.0, 0.0)) for name, row in zip(("forward", "back"), _one_hot(2), strict=True)]
    cameras = _cameras(2)
    return cameras * 2 + moves * 2 + [together(move, camera) for move, camera in product(moves, cameras)]


def templerun_presets() -> list[Preset]:
    """Upstream's 7 entries for one-hot keys without a mouse, in the order in which they are drawn from."""
    names = ("nomove", "jump", "slide", "turnleft", "turnright", "leftside", "rightside")
    by_name = {name: Preset(name, row) for name, row in zip(names, _one_hot(7), strict=True)}
    return [by_name[name] for name in ("jump", "slide", "leftside", "rightside", "turnleft", "turnright", "nomove")]


UPSTREAM_PRESETS = {"universal": universal_presets, "gta_drive": gta_drive_presets, "templerun": templerun_presets}


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
    """Where upstream's overlay draws the cursor: (x, y) px (n 2) after each row of mouse (n 2) in (pitch, yaw)."""
    moves = mouse[:, ::-1].astype(np.float32) * np.array(CURSOR_PX_PER_UNIT, np.float32)
    start = np.array([CURSOR_START_PX], np.float32)
    return np.cumsum(np.concatenate([start, moves]), axis=0, dtype=np.float32)[1:]  # upstream's sum is fp32 too


def lit_keys(game: str, actions: Actions) -> np.ndarray:
    """Which keys upstream's overlay lights (n keys): W, A, S, D, and for templerun left and right, 0 or 1."""
    keyboard = actions.keyboard
    if game == "gta_drive":  # A and D steer, which is the mouse's yaw
        yaw = actions.mouse[:, 1]
        return np.stack([keyboard[:, 0], yaw < 0, keyboard[:, 1], yaw > 0], axis=1).astype(np.float32)
    columns = {"universal": [0, 2, 1, 3], "templerun": [1, 5, 2, 6, 3, 4]}
    if game not in columns:
        raise ValueError(f"no overlay of upstream's for {game!r}; there are: gta_drive, {', '.join(columns)}")
    return keyboard[:, columns[game]]


def _cameras(keys: int) -> list[Preset]:
    still = (0.0,) * keys
    return [Preset("camera_l", still, (0.0, -CAMERA_STEP)), Preset("camera_r", still, (0.0, CAMERA_STEP))]


def _one_hot(keys: int) -> list[tuple[float, ...]]:
    return [tuple(row) for row in np.eye(keys).tolist()]
