"""Playing a world: along given actions, or live, with the actions of each piece as they come."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.types import Actions
from data_pipeline.video import fit_frame, to_video
from model.world import WorldModel
from sampling.chunked import ChunkedRollout
from sampling.denoising import Denoising, Rows
from sampling.rollout import Rollout
from sampling.streaming import StreamingRollout


def start_rollout(world: WorldModel, prompt: Tensor, seeds: Sequence[int], denoising: Denoising) -> Rollout:
    """The rollout of the world's kind from pictures (b 3 h w) or clips (b 3 n h w), one seed each."""
    kind = ChunkedRollout if world.layout == "chunked" else StreamingRollout
    return kind(world, prompt.to(world.device), seeds, denoising)


def play(
    world: WorldModel, prompt: Tensor, actions: Rows, seeds: Sequence[int], denoising: Denoising
) -> Iterator[Tensor]:
    """Piece after piece of frames (b n h w 3) uint8, as many frames as `actions` has rows, each as soon as it is made.

    `actions`: keyboard (b n k) and mouse (b n 2) from the prompt's first frame on. The last row is held, and the last
    piece cut, where pieces do not divide the frames.
    """
    rollout, frames, made = start_rollout(world, prompt, seeds, denoising), actions[0].shape[1], 0
    while made < frames:
        rows = torch.arange(made, made + rollout.frames_due).clamp(max=frames - 1)
        piece = rollout.step(*(stream[:, rows.to(stream.device)] for stream in actions))
        yield piece[:, : frames - made]
        made += piece.shape[1]


class LiveWorld:
    """One player's rollout."""

    def __init__(
        self, world: WorldModel, prompt: np.ndarray, seed: int = 0, denoising: Denoising | None = None
    ) -> None:
        """`prompt` (h w 3) uint8 is fitted to the game's size."""
        self.world, self.denoising = world, denoising or Denoising()
        self.restart(prompt, seed)

    def restart(self, prompt: np.ndarray, seed: int = 0) -> None:
        """Starts again from a picture (h w 3) uint8; everything before is forgotten."""
        picture = fit_frame(prompt, self.world.game.height, self.world.game.width)
        image = to_video(torch.from_numpy(picture)[None, None])[:, :, 0]
        self.rollout = start_rollout(self.world, image, [seed], self.denoising)

    @property
    def frames_due(self) -> int:
        """Frames that the next step makes."""
        return self.rollout.frames_due

    def adjust(self, denoising: Denoising) -> None:
        """Other steps or another guidance for what comes."""
        self.denoising = self.rollout.denoising = denoising

    def settle(self) -> None:
        """Does now what would else delay the next step."""
        self.rollout.settle()

    def answer(self, row: Actions) -> np.ndarray:
        """The next frames (n h w 3) uint8, all of which answer `row`: it is held for all of them,
        and in the interval before the first if that is `revisable`."""
        keyboard, mouse = (torch.from_numpy(array)[None] for array in (row.keyboard, row.mouse))
        if self.rollout.revisable:
            self.rollout.revise(keyboard, mouse)
        return self.step(row)

    def step(self, actions: Actions) -> np.ndarray:
        """The next frames (n h w 3) uint8; `actions` has n rows, or one that is held for all of them."""
        rows = (torch.from_numpy(array)[None] for array in (actions.keyboard, actions.mouse))
        expanded = (row.expand(-1, self.frames_due, -1) if row.shape[1] == 1 else row for row in rows)
        return self.rollout.step(*expanded)[0].cpu().numpy()
