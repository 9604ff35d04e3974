"""A video that goes on piece by piece, each piece answering the actions of its frames."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.video import to_uint8
from model.world import WorldModel
from sampling.denoising import Denoising, Rows


class Rollout(ABC):
    """A batch of videos that go on together; each depends on its seed, prompt and actions alone.

    It starts from pictures (b 3 h w) in [-1, 1], which are frame 0, or from clips (b 3 n h w) of whole pieces, which
    the first steps return as the codec shows them. Memory does not grow with time.
    """

    frames_due: int  # frames of the next piece
    # Whether the last row is free to change. A frame answers the rows before it, but the very first one its own.
    revisable = False
    denoise_s: float  # seconds of the newest piece's denoising; its step took the rest
    _unsettled: Callable[[], object] | None = None  # what is left to do of the newest piece
    _past_rows: int  # action rows of earlier pieces that the next one needs

    @torch.inference_mode()
    def __init__(self, world: WorldModel, prompt: Tensor, seeds: Sequence[int], denoising: Denoising) -> None:
        height, width = prompt.shape[-2:]
        unit = world.codec.config.spatial * world.dit.config.patch_size[1]
        if height % unit or width % unit:
            raise UserError(f"a picture of {height}x{width} px: both must be multiples of {unit} (codec x patch)")
        if len(seeds) != len(prompt):
            raise UserError(f"{len(seeds)} seeds for {len(prompt)} pictures: give one each")
        self.world, self.seeds, self.denoising, self.pieces = world, tuple(seeds), denoising, 0
        space = world.game.action_space
        self._widths = len(space.keys), 2 * space.mouse
        keyboard, mouse = (torch.zeros(len(seeds), 0, width, device=world.device) for width in self._widths)
        self._past: Rows = keyboard, mouse
        self._prompt: list[Tensor] = []  # latents of the pieces of a clip, which the next steps return

    @torch.inference_mode()
    def step(self, keyboard: Tensor, mouse: Tensor) -> Tensor:
        """The next piece, frames (b n h w 3) uint8, for keyboard (b n k) and mouse (b n 2) of n = `frames_due` rows.

        Row i is held during the interval of frame i, so the last row leads to the first frame of the piece after.
        """
        self.settle()
        keyboard, mouse = (
            torch.cat([past, self._checked(name, rows, width)], dim=1)
            for name, past, rows, width in zip(
                ("keyboard", "mouse"), self._past, (keyboard, mouse), self._widths, strict=True
            )
        )
        actions, started = (keyboard, mouse), time.perf_counter()
        latents = self._prompt.pop(0) if self._prompt else self._denoise(actions)
        self.denoise_s = time.perf_counter() - started
        self.revisable = self.frames_due > 1
        frames = self._finish(latents, actions)
        first = max(0, keyboard.shape[1] - self._past_rows)
        self._past, self.pieces = (keyboard[:, first:], mouse[:, first:]), self.pieces + 1
        return frames

    @torch.inference_mode()
    def settle(self) -> None:
        """Remembers the newest piece, if that is left to do: the next step needs it, but its frames need not wait."""
        if self._unsettled:
            self._unsettled()
            self._unsettled = None

    @torch.inference_mode()
    def revise(self, keyboard: Tensor, mouse: Tensor) -> None:
        """Another keyboard (b 1 k) and mouse (b 1 2) for the last row of the step before, which no frame has answered
        yet: the next piece then answers newer actions from its first frame on. Only while it is `revisable`."""
        assert self.revisable
        rows = (row.to(self.world.device) for row in (keyboard, mouse))
        keyboard, mouse = (
            torch.cat([past[:, :-1], row], dim=1)[:, : past.shape[1]]
            for past, row in zip(self._past, rows, strict=True)
        )
        self._past = keyboard, mouse

    def _checked(self, name: str, rows: Tensor, width: int) -> Tensor:
        """Action rows on the world's device; a UserError unless they are finite and of the next piece."""
        expected = (len(self.seeds), self.frames_due, width)
        if tuple(rows.shape) != expected:
            needs = f"{expected}, for {self.world.game.action_space.describe()}"
            raise UserError(f"{name} actions of shape {tuple(rows.shape)}: the next piece needs {needs}")
        if not rows.isfinite().all():
            raise UserError(f"{name} actions hold NaN or infinite numbers")
        return rows.to(self.world.device)

    @abstractmethod
    def _denoise(self, actions: Rows) -> Tensor:
        """New latents (b c f h w) for `actions`, those of the past first."""

    @abstractmethod
    def _finish(self, latents: Tensor, actions: Rows) -> Tensor:
        """The frames (b n h w 3) uint8 of a piece, which becomes the past of the next."""


def decoding(world: WorldModel) -> torch.autocast:
    """The precision in which the codec decodes."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=world.dtype == torch.bfloat16)


@torch.inference_mode()
def decode_frames(world: WorldModel, latents: Tensor) -> Tensor:
    """Frames (b n h w 3) uint8 of a clip's latents (b c f h w)."""
    with decoding(world):
        return to_uint8(world.codec.decode(latents))
