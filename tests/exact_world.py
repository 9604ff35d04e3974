"""A world that answers keys exactly, for tests of play: a white bar in a coloured room.

Turning right moves the bar to the left by a pixel a degree, walking widens it. The rollout is the usual one; only
what a model would have learnt is written down here.
"""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_world import DIT, SPACE
from torch import Tensor, nn

from configs import load_config
from configs.game import GameConfig
from model.codec import Codec
from model.flow import FlowMatch, FlowMatchConfig
from model.masks import CausalConfig
from model.world import WorldModel, WorldModelConfig
from sampling.live.config import PlayConfig
from sampling.live.server import serve

GAME = GameConfig("exact", replace(SPACE, mouse_unit_deg=1.0), fps=17.5, height=96, width=160)
MODEL = replace(DIT, causal=CausalConfig(block=1, window=8))
TRAINED = WorldModelConfig(MODEL, FlowMatchConfig(), GAME, "continuous", "codec", "0" * 12)
STEP_PX, HALF_PX = 0.5, 4.0  # what walking for a frame adds to the bar's half width at first
STARTS = [np.full((96, 160, 3), colour, np.uint8) for colour in ((150, 40, 40), (40, 40, 160))]


class RoomCodec(Codec):
    """Latents of 16 channels: yaw and depth at the ends of four frames, then the room's colour."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(spatial=8, temporal=4)

    def encode_stream(self, video: Tensor, state: Any) -> tuple[Tensor, Any]:
        b, _, _, height, width = video.shape
        latents = torch.zeros(b, 16, 1, height // 8, width // 8)
        latents[:, 8:11] = video.mean(dim=(2, 3, 4))[:, :, None, None, None]
        return latents, True

    def decode_stream(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        facts = latents.mean(dim=(3, 4))  # (b c f)
        places = facts[:, :8].unflatten(1, (4, 2))[..., 0]  # (b 4 2)
        places = places[:, -1:] if state is None else places
        columns = torch.arange(8 * latents.shape[4])
        middle, half = len(columns) / 2 - places[..., 0], HALF_PX + places[..., 1]
        away = (columns - middle[..., None] + len(columns) / 2) % len(columns) - len(columns) / 2  # round the room
        bar = away.abs() <= half[..., None]  # (b n w)
        shape = len(latents), 3, places.shape[1], 8 * latents.shape[3], len(columns)
        room = facts[:, 8:11, 0, None, None, None].expand(shape)
        return torch.where(bar[:, None, :, None], 1.0, room), True


@dataclass
class Place:
    """The cache: where the newest frame is, and the room's colour."""

    grid: tuple[int, int, int]
    place: Tensor  # (b 2)
    colour: Tensor  # (b 3)


class Rules(nn.Module):
    """In place of a model: the velocity that leads to what the actions make of the newest frame."""

    config = MODEL

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(1, 1)

    def make_cache(self, b: int, height: int, width: int, visual: Tensor | None) -> Place:
        return Place((b, height // 2, width // 2), torch.zeros(b, 2), torch.zeros(b, 3))

    def forward(
        self, x: Tensor, timestep: Tensor, cond: Tensor, keyboard: Tensor, mouse: Tensor, visual: None,
        cache: Place, update_cache: bool = False,
    ) -> Tensor:  # fmt: skip
        if update_cache:
            facts = x.mean(dim=(2, 3, 4))
            cache.place, cache.colour = facts[:, 6:8], facts[:, 8:11]
            return x
        walked = STEP_PX * (keyboard[:, 0, -4:, 0] - keyboard[:, 0, -4:, 1])
        moves = torch.stack([mouse[:, 0, -4:, 1], walked], dim=-1).cumsum(dim=1)  # (b 4 2)
        facts = torch.zeros(len(x), 16)
        facts[:, :8], facts[:, 8:11] = (cache.place[:, None] + moves).flatten(1), cache.colour
        return (x - facts[:, :, None, None, None]) / (timestep / 1000)[:, None, None, None, None]


@dataclass(frozen=True, kw_only=True)
class ExactConfig(PlayConfig):
    """Plays the rules, whatever `checkpoint` is called."""

    def load(self, checkpoint: str) -> WorldModel:
        world: Any = (Rules().requires_grad_(False), FlowMatch(TRAINED.flow), RoomCodec(), GAME)
        return WorldModel(*world)


def bar(frame: np.ndarray) -> tuple[float, float]:
    """The middle and the width of the bar in a picture (h w 3), px of the game."""
    white = np.flatnonzero(frame[frame.shape[0] // 2].min(axis=-1) > 190) * GAME.width / frame.shape[1]
    return float(white.mean()), float(np.ptp(white))


if __name__ == "__main__":
    serve(load_config(ExactConfig, ["checkpoint=exact", "steps=1", *sys.argv[1:]]), "exact", TRAINED, STARTS)
