"""Optional parts that the released models lack: each starts at zero, so that it changes nothing before it is trained.

A Wan transformer knows no absolute place, and its keyboard branch adds one vector to all tokens: it learns to turn, a
uniform shift, and neither to walk nor to strafe (docs/lab_notes.md). Its patches are predicted each by itself.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from model.actions import ActionConfig

FREQUENCIES = 4  # of the sines and cosines of a place, along rows and along columns
PLACE = 6 + 4 * FREQUENCIES  # features of a place


def place_features(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """Features (h*w PLACE) of the places of a grid, whose rows and columns run from -1 to 1 whatever its size."""
    y, x = (((2 * torch.arange(n, device=device) + 1) / n - 1) for n in (h, w))
    y, x = (place.flatten() for place in torch.meshgrid(y, x, indexing="ij"))
    angles = torch.pi / 2 * 2.0 ** torch.arange(FREQUENCIES, device=device)
    waves = [wave(place[:, None] * angles) for place in (y, x) for wave in (torch.sin, torch.cos)]
    return torch.cat([torch.stack([torch.ones_like(y), y, x, y * y, x * y, x * x], dim=1), *waves], dim=1)


def action_rows(config: ActionConfig, f: int, keyboard: Tensor | None, mouse: Tensor | None, like: Tensor) -> Tensor:
    """Keys and mouse of the action windows (b f window k); zeros for a branch that is not given."""
    widths = [(keyboard, config.enable_keyboard * config.keys), (mouse, config.enable_mouse * config.mouse_dim_in)]
    rows = [
        like.new_zeros(len(like), f, config.window, width) if given is None else given.to(like.dtype)
        for given, width in widths
        if width
    ]
    return torch.cat(rows, dim=3)


def row_size(config: ActionConfig) -> int:
    """Numbers of a frame's keys and mouse."""
    return config.enable_keyboard * config.keys + config.enable_mouse * config.mouse_dim_in


class ActionTimeEmbedding(nn.Sequential):
    """What the actions add to the time embedding: (b f window k) -> (b f d)."""

    def __init__(self, config: ActionConfig, dim: int) -> None:
        rows = config.window * row_size(config)
        super().__init__(nn.Flatten(2), nn.Linear(rows, dim), nn.SiLU(), nn.Linear(dim, dim))


class ActionPlaceMap(nn.Module):
    """What the actions add to a token at each place: a linear map of (actions x place), and one of the place alone."""

    def __init__(self, config: ActionConfig, dim: int) -> None:
        super().__init__()
        self.frames = config.vae_time_compression_ratio
        self.actions = nn.Linear(config.windows_size * row_size(config), PLACE * dim, bias=False)
        self.place = nn.Linear(PLACE, dim, bias=False)

    def forward(self, rows: Tensor, h: int, w: int) -> Tensor:
        """(b f*h*w d) for rows (b f window k) of a grid of h x w tokens; of each latent frame the mean action."""
        places = place_features(h, w, rows.device).to(rows.dtype)
        means = rearrange(rows, "b f (m n) k -> b f m n k", n=self.frames).mean(dim=3).flatten(2)
        maps = rearrange(self.actions(means), "b f (p d) -> b f p d", p=PLACE)
        return rearrange(places @ (maps + self.place.weight.t()), "b f s d -> b (f s) d")


class PatchBorders(nn.Module):
    """A correction of the velocity by convolutions over latents, which see across the borders of patches."""

    def __init__(self, dim: int, width: int, known: int, latents: int, patch: int) -> None:
        """`width` channels from the tokens and inside; `known` channels go in, `latents` come out."""
        super().__init__()
        self.patch = patch
        self.tokens = nn.Linear(dim, width * patch * patch)
        self.mix = nn.Conv2d(known + width, 2 * width, 3, padding=1)
        self.correct = nn.Conv2d(2 * width, latents, 3, padding=1)

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        """(b c f h w) float32 for tokens (b l d) and what is known at each latent (b k f h w)."""
        f, h, w = known.shape[2], known.shape[3] // self.patch, known.shape[4] // self.patch
        sizes = {"f": f, "h": h, "w": w, "p": self.patch, "q": self.patch}
        lifted = rearrange(self.tokens(tokens), "b (f h w) (p q c) -> (b f) c (h p) (w q)", **sizes)
        flat = rearrange(known, "b k f y x -> (b f) k y x").to(lifted.dtype)
        mixed = nn.functional.silu(self.mix(torch.cat([flat, lifted], dim=1)))
        return rearrange(self.correct(mixed), "(b f) c y x -> b c f y x", f=f).float()
