"""A world that answers: actions in, frames out, for as long as somebody plays."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from data_pipeline.types import Actions
from data_pipeline.video import fit_frame, to_video
from model.world import WorldModel
from sampling.denoising import Denoising
from sampling.streaming import Stream


class LiveWorld:
    """One player's stream of a causal model."""

    def __init__(
        self,
        world: WorldModel,
        prompt: np.ndarray,
        seed: int = 0,
        denoising: Denoising | None = None,
    ) -> None:
        """`prompt` (h w 3) uint8 is fitted to the game's size."""
        self.world, self.denoising = world, denoising or Denoising()
        self.restart(prompt, seed)

    def restart(self, prompt: np.ndarray, seed: int = 0) -> None:
        """Begins anew from a picture (h w 3) uint8; everything before is forgotten."""
        picture = fit_frame(prompt, self.world.game.height, self.world.game.width)
        image = to_video(torch.from_numpy(picture)[None, None])[:, :, 0].to(self.world.device)
        self.stream = Stream(self.world, image, [seed], self.denoising)

    @property
    def frames_due(self) -> int:
        """Frames that the next step makes."""
        return self.stream.frames_due

    def step(self, actions: Actions) -> np.ndarray:
        """The next frames (n h w 3) uint8, 9 at the start and then 12 for blocks of three latents.

        `actions` has n rows, or one that is held for all of them. Raises ValueError in one line for other lengths or
        widths and for NaN.
        """
        rows = (torch.from_numpy(one)[None] for one in (actions.keyboard, actions.mouse))
        keyboard, mouse = (one.expand(-1, self.frames_due, -1) if one.shape[1] == 1 else one for one in rows)
        return self.stream.step(keyboard, mouse)[0].cpu().numpy()

    def play(self, act: Callable[[int], Actions]) -> Iterator[np.ndarray]:
        """Block after block of frames as `step` gives them, without an end; `act(n)` is asked for the actions of the
        next n frames just before they are made."""
        while True:
            yield self.step(act(self.frames_due))
