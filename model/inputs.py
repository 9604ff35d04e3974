"""What the model is given besides noise and time: known latents behind a mask, windows of actions, image tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from configs.errors import UserError
from model.layout import Layout, latent_ends

MASK_CHANNELS = 4  # of Wan's image-to-video input; all four carry the same value per latent frame


def model_inputs(
    dit: nn.Module,
    actions: Sequence[Tensor | None],
    layout: Layout,
    cond: Tensor,
    visual: Tensor | None = None,
    offset: int = 0,
) -> dict[str, Tensor | None]:
    """The keyword arguments of `ActionDiT.forward` besides noise and time, for the f latents of `cond` (b 4+c f h w).

    `actions` are keyboard (b n k) and mouse (b n 2): a row per frame of these latents in `layout`, the first frame's at
    row `offset`, rows of the past before it. They give None where the model has no such branch, or the action space no
    such input. `visual` (b m c) are image tokens.
    """
    inputs = {"cond": cond, "keyboard": None, "mouse": None, "visual": visual}
    unwrapped: Any = getattr(dit, "module", dit)  # a training engine may wrap it
    if action := unwrapped.config.action:
        ends = [offset + end for end in latent_ends(layout, cond.shape[2], action.vae_time_compression_ratio)]
        enabled = {"keyboard": action.enable_keyboard, "mouse": action.enable_mouse}
        for name, rows in zip(enabled, actions, strict=True):
            if enabled[name] and rows is not None and rows.shape[-1]:
                inputs[name] = action_windows(rows, ends, action.window)
    return inputs


def action_windows(actions: Tensor, ends: Sequence[int], window: int) -> Tensor:
    """Windows (b f window k) of actions (b n k) for latent frames that end with pixel frames `ends`.

    Latent i sees rows ends[i] - window ... ends[i] - 1, row 0 in place of negative ones: the actions that led to its
    last frame, never that frame's own action, which leads to the next frame.
    """
    if max(ends) > actions.shape[1]:
        raise UserError(f"{actions.shape[1]} actions for latents that end at frame {max(ends)}: give one per frame")
    last = torch.tensor(list(ends), device=actions.device)[:, None]
    rows = (last + torch.arange(-window, 0, device=actions.device)).clamp(min=0)
    return actions[:, rows]


def condition(latents: Tensor, known: int) -> Tensor:
    """The conditioning (b 4+c f h w) of `latents` (b c f h w) whose first `known` latent frames are given.

    The other latents are zero, the mean of a normalised latent. `known` is 1 for a prompt frame, 3 for a context chunk.
    """
    if not 0 <= known <= latents.shape[2]:
        raise UserError(f"{known} known latent frames in a clip of {latents.shape[2]}")
    zeros = torch.zeros_like(latents[:, :, known:])
    return with_mask(torch.cat([latents[:, :, :known], zeros], dim=2), known)


def condition_on_last(first: Tensor, past: Tensor, sigma: Tensor, block: int) -> Tensor:
    """The conditioning (b 4+c f h w) where each block is given the last latent before it: `causal.unknown: last`.

    `past` (b c f h w) are the finished latents at their noise levels `sigma` (b f); the mask channels carry 1 - sigma.
    The first block is given the clip's own `first` latent (b c 1 h w), without noise.
    """
    f, own = past.shape[2], min(block, past.shape[2])
    before = torch.arange(block, f, device=past.device) // block * block - 1
    given = torch.cat([first.expand(-1, -1, own, -1, -1), past[:, :, before]], dim=2)
    return known_at(given, torch.cat([torch.zeros_like(sigma[:, :own]), sigma[:, before]], dim=1))


def known_at(latents: Tensor, sigma: Tensor) -> Tensor:
    """(b 4+c f h w): a mask of 1 - sigma (b f) before `latents` (b c f h w) of these noise levels."""
    mask = repeat(1 - sigma, "b f -> b m f h w", m=MASK_CHANNELS, h=latents.shape[3], w=latents.shape[4])
    return torch.cat([mask.to(latents.dtype), latents], dim=1)


def with_mask(latents: Tensor, known: int) -> Tensor:
    """(b 4+c f h w): the mask, 1 at the first `known` latent frames, before `latents` (b c f h w) as they are.

    With the latents of an image and grey frames this is the released models' conditioning; `known` is 1, or 0 if the
    image came earlier.
    """
    mask = torch.zeros_like(latents[:, :1])
    mask[:, :, :known] = 1
    return torch.cat([mask.repeat_interleave(MASK_CHANNELS, dim=1), latents], dim=1)
