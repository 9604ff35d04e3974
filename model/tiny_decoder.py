"""A tiny decoder of Wan 2.1 latents for live use: the architecture of TAEHV (madebyollin/taehv, taew2_1).

2-D convolutions only; blocks that also see the frame before theirs are its whole memory, so nine feature maps per
sample are all that a stream keeps. Parameter names are those of the released file, numbered places of a sequence.
"""

import math
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from model.third_party import load_third_party
from model.weights import require_same_tensors

CHANNELS = 16  # of a latent
WIDTHS = (256, 128, 64, 64)  # of taew2_1, from latent to pixel resolution
TIME_GROWTH = (1, 2, 2)  # frames that one becomes at each of the three upsamplings
BLOCKS_PER_LEVEL = 3

TinyState = list[Tensor]  # the newest features (b c h w) that enter each memory block


class Clamp(nn.Module):
    """Bends values into (-3, 3), smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """A residual block over a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(inplace=True),
            _conv(width, width), nn.ReLU(inplace=True),
            _conv(width, width),
        )  # fmt: skip

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """(m c h w) of m frames and of the frames before them -> (m c h w)."""
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TGrow(nn.Module):
    """Each frame becomes `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(m c h w) -> (m stride, c h w), the new frames of one after each other."""
        return rearrange(self.conv(x), "m (t c) h w -> (m t) c h w", t=self.stride)


class TinyDecoder(nn.Module):
    """Normalised Wan 2.1 latents to video; 4 frames per latent, the first three of a clip dropped."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Clamp(), _conv(CHANNELS, WIDTHS[0]), nn.ReLU(inplace=True)]
        for width, following, growth in zip(WIDTHS[:-1], WIDTHS[1:], TIME_GROWTH, strict=True):
            layers += [MemBlock(width) for _ in range(BLOCKS_PER_LEVEL)]
            layers += [nn.Upsample(scale_factor=2), TGrow(width, growth), _conv(width, following, bias=False)]
        layers += [nn.ReLU(inplace=True), _conv(WIDTHS[-1], 3)]
        self.decoder = nn.Sequential(*layers)
        self.dropped = math.prod(TIME_GROWTH) - 1  # Wan's first latent is one frame

    def decode_stream(self, latents: Tensor, state: TinyState | None) -> tuple[Tensor, TinyState]:
        """The next frames (b 3 n h w), about [-1, 1], and the state that the block after it needs; None starts a clip.

        Latents (b 16 f h/8 w/8), normalised, give 4 f frames, or 1 + 4 (f - 1) at the start; block by block equals the
        whole.
        """
        b, following = len(latents), []
        x = rearrange(latents, "b c f h w -> (b f) c h w").to(next(self.parameters()).dtype)
        for layer in self.decoder:
            if isinstance(layer, MemBlock):
                frames = rearrange(x, "(b f) c h w -> b f c h w", b=b)
                first = torch.zeros_like(frames[:, 0]) if state is None else state[len(following)]
                past = torch.cat([first[:, None], frames[:, :-1]], dim=1)
                following.append(frames[:, -1].clone())  # a copy: the view would keep the whole block alive
                x = layer(x, rearrange(past, "b f c h w -> (b f) c h w"))
            else:
                x = layer(x)
        video = rearrange(x, "(b n) c h w -> b c n h w", b=b).float() * 2 - 1
        return (video[:, :, self.dropped :] if state is None else video), following


def load_tiny_decoder(path: str | Path) -> TinyDecoder:
    """The tiny decoder in a released file (taew2_1.pth or .safetensors), in eval mode on the CPU; the encoder that such
    a file also holds is left out."""
    stored = load_third_party(path)
    state, tiny = stored.renamed({name: name for name in stored if not name.startswith("encoder.")}), TinyDecoder()
    require_same_tensors(tiny.state_dict(), state.specs, f"{path} is no tiny decoder (TAEHV)")
    tiny.load_state_dict(state)
    return tiny.eval()


def _conv(n_in: int, n_out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias)
