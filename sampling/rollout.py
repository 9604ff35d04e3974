"""What a rollout is: a video that goes on piece by piece, each piece answering the actions of its frames."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.video import to_uint8
from model.world import WorldModel
from sampling.denoising import Rows


class Rollout(Protocol):
    """A batch of videos that go on together; each depends on its own seed, prompt and actions alone.

    It starts from pictures (b 3 h w) in [-1, 1], which are frame 0, or from clips (b 3 n h w) of whole pieces, which
    the first steps return as the codec shows them. Memory does not grow with time.
    """

    @property
    def frames_due(self) -> int:
        """Frames of the next piece."""
        ...

    def step(self, keyboard: Tensor, mouse: Tensor) -> Tensor:
        """The next piece, frames (b n h w 3) uint8, for keyboard (b n k) and mouse (b n 2) of n = `frames_due` rows.

        Row i is held during the interval of frame i, so the last row leads to the first frame of the piece after.
        """
        ...


def require_prompt(world: WorldModel, prompt: Tensor, seeds: Sequence[int]) -> Tensor:
    """The first picture (b 3 h w) of `prompt`, pictures or clips as in `Rollout`; refused where sizes do not fit."""
    height, width = prompt.shape[-2:]
    unit = world.codec.config.spatial * world.dit.config.patch_size[1]
    if height % unit or width % unit:
        raise UserError(f"a picture of {height}x{width} px: both must be multiples of {unit} (codec x patch)")
    if len(seeds) != len(prompt):
        raise UserError(f"{len(seeds)} seeds for {len(prompt)} pictures: give one each")
    return prompt[:, :, 0] if prompt.ndim == 5 else prompt


def require_actions(world: WorldModel, actions: Rows, b: int, n: int) -> Rows:
    """Keyboard and mouse on the world's device; refused unless they are n finite rows of its game for b samples."""
    space = world.game.action_space
    for name, rows, width in zip(("keyboard", "mouse"), actions, (len(space.keys), 2 * space.mouse), strict=True):
        if tuple(rows.shape) != (b, n, width):
            raise UserError(
                f"{name} actions of shape {tuple(rows.shape)}: the next {n} frames of {b} samples need "
                f"{(b, n, width)}, for {space.describe()}"
            )
        if not rows.isfinite().all():
            raise UserError(f"{name} actions hold NaN or infinite numbers")
    return actions[0].to(world.device), actions[1].to(world.device)


def with_past(past: Rows | None, actions: Rows) -> Rows:
    """The rows of `actions` behind those of the past, if there is one."""
    if past is None:
        return actions
    return torch.cat([past[0], actions[0]], dim=1), torch.cat([past[1], actions[1]], dim=1)


@torch.inference_mode()
def decode_frames(world: WorldModel, latents: Tensor) -> Tensor:
    """Frames (b n h w 3) uint8 of a clip's latents (b c f h w)."""
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=world.dtype == torch.bfloat16):
        return to_uint8(world.codec.decode(latents))
