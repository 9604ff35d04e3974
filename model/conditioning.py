"""What the model is told besides noise, time and actions: which latents are known."""

from typing import Literal

import torch
from torch import Tensor

from configs.errors import UserError

# What stands for latents that are not given: zeros, or the codec's latents of grey frames (the released models).
Unknown = Literal["zeros", "grey"]
MASK_CHANNELS = 4  # of Wan's image-to-video input; all four carry the same value per latent frame


def masked(latents: Tensor, known: int) -> Tensor:
    """(b 4+c f h w): the mask, 1 at the first `known` latent frames, before `latents` (b c f h w) as they are.

    With the latents of an image and grey frames this is the released models' conditioning; `known` is 1, or 0 if the
    image came earlier.
    """
    mask = torch.zeros_like(latents[:, :1])
    mask[:, :, :known] = 1
    return torch.cat([mask.repeat_interleave(MASK_CHANNELS, dim=1), latents], dim=1)


def condition(latents: Tensor, known: int) -> Tensor:
    """The conditioning (b 4+c f h w) of `latents` (b c f h w) whose first `known` latent frames are given.

    Mask channels first: 1 where the latent is known, 0 where the model must make it up; then the latents themselves,
    zero (the mean of a normalised latent) where unknown. `known` is 1 for a prompt frame and 3 for a context chunk.
    """
    if not 0 <= known <= latents.shape[2]:
        raise UserError(f"{known} known latent frames in a clip of {latents.shape[2]}")
    unknown = torch.zeros_like(latents[:, :, known:])
    return masked(torch.cat([latents[:, :, :known], unknown], dim=2), known)
