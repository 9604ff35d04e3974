"""Which frames see which: one block-causal rule, and the dense mask, the flex mask and the slices that follow."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from configs import within
from configs.errors import UserError
from model.limits import BELOW_1, MANY


@dataclass(frozen=True)
class CausalConfig:
    """How a causal model sees time. All lengths are in latent frames."""

    block: int = within(1, MANY, 3)  # frames that are made together and see each other
    # Frames that a block sees, itself and the sink among them; None: all before it.
    window: int | None = within(1, 1 << 20, None)
    sink: int = within(0, MANY, 0)  # first frames of the video that video tokens always see
    action_sink: int = within(0, MANY, 0)  # the same in the action modules; upstream has a sink for video tokens only
    # `absolute` counts from the start of the video, as upstream. `relative` counts inside the window, so that the sink
    # never moves out of the range of distances that the model was trained on.
    positions: Literal["absolute", "relative"] = "absolute"
    context_noise: float = within(0, BELOW_1, 0.0)  # noise level (sigma) at which a finished block enters the cache
    # Conditioning of the latents that are not given: zeros, the codec's latents of mid-grey frames (official files), or
    # the last finished latent as the caches have it, with 1 - its noise level in the mask channels.
    unknown: Literal["zeros", "grey", "last"] = "zeros"

    def __post_init__(self) -> None:
        if self.window is not None and self.window < self.block + max(self.sink, self.action_sink):
            what = f"a block of {self.block} frames, sink={self.sink} and action_sink={self.action_sink}"
            raise UserError(f"model.causal.window={self.window} must hold {what}")

    def video_rule(self) -> "BlockCausal":
        """What video tokens see."""
        return BlockCausal(self.block, self.window, self.sink, self.positions == "relative")

    def action_rule(self) -> "BlockCausal":
        """What the action modules see."""
        return BlockCausal(self.block, self.window, self.action_sink, self.positions == "relative")


@dataclass(frozen=True)
class BlockCausal:
    """A frame sees its own block whole, and of the frames before the sink and the newest ones that the window holds."""

    block: int
    window: int | None = None
    sink: int = 0
    relative: bool = False  # positions are counted inside the window


@dataclass(frozen=True)
class BlockCausalMask:
    """The rule for a clip of `frames`, with `queries` and `keys` tokens per frame.

    `doubled`: twice the frames, a past and then the clip again, as teacher forcing trains it. The past sees itself by
    the rule; a block of the second half sees of the past what a stream's cache would hold, and itself.
    """

    rule: BlockCausal
    frames: int
    queries: int = 1
    keys: int = 1
    doubled: bool = False

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """For each block its frames and the ranges of frames that it sees, oldest first."""
        for half in range(1 + self.doubled):
            for start in range(0, self.frames, self.rule.block):
                newest, seen = self._seen_from(start)
                own = slice(half * self.frames + start, half * self.frames + newest)
                if half:
                    seen = [slice(frames.start, min(frames.stop, start)) for frames in seen] + [own]
                yield own, [frames for frames in seen if frames.stop > frames.start]

    def _seen_from(self, start: int) -> tuple[int, list[slice]]:
        """The end of the block that begins at `start`, and the ranges of frames that the rule lets it see."""
        rule, end = self.rule, start + self.rule.block  # of a whole block: a clip's rest sees what its block would
        newest = min(end, self.frames)
        oldest = 0 if rule.window is None else end - (rule.window - rule.sink)
        seen = [slice(0, rule.sink), slice(oldest, newest)] if oldest > rule.sink else [slice(0, newest)]
        return newest, seen

    def by_frame(self, device: torch.device) -> Tensor:
        """(f m) bool, true where query frame f may look at key frame m."""
        frames = self.frames * (1 + self.doubled)
        seen = torch.zeros(frames, frames, dtype=torch.bool, device=device)
        for own, ranges in self.blocks():
            for frames_seen in ranges:
                seen[own, frames_seen] = True
        return seen


# A handful of clip lengths and resolutions live at a time; a mask of 21 x 880 tokens is 340 MB. A mask made while
# sampling must also serve training, where tensors of inference mode may not go.
@lru_cache(maxsize=4)
@torch.inference_mode(False)
def dense_mask(mask: BlockCausalMask, device: torch.device) -> Tensor:
    """(l m) bool, true where query token l may look at key token m."""
    return mask.by_frame(device).repeat_interleave(mask.queries, dim=0).repeat_interleave(mask.keys, dim=1)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def window_mask(mask: BlockCausalMask, device: torch.device) -> Tensor:
    """(i l m) bool of a doubled clip's blocks i: what both halves of a block see of the window of the first half that
    ends with it, and of the block's second half."""
    block, window = mask.rule.block, mask.rule.window
    assert window is not None
    first = torch.arange(0, mask.frames, block, device=device)[:, None]  # of each block
    shown = first + block - window + torch.arange(window, device=device)
    own = mask.frames + first + torch.arange(block, device=device)
    queries, keys = torch.cat([first, mask.frames + first], dim=1), torch.cat([shown.clamp(min=0), own], dim=1)
    seen = mask.by_frame(device)[queries[:, :, None], keys[:, None]]
    seen[:, :, :window] &= shown[:, None] >= 0  # before the clip there is nothing
    return seen.repeat_interleave(block * mask.queries, dim=1).repeat_interleave(mask.keys, dim=2)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def flex_mask(mask: BlockCausalMask, device: torch.device) -> BlockMask:
    """The same for torch's flex_attention."""
    by_frame = mask.by_frame(device)

    def sees(b: Tensor, a: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return by_frame[query // mask.queries, key // mask.keys]

    lengths = len(by_frame) * mask.queries, len(by_frame) * mask.keys
    return create_block_mask(sees, None, None, *lengths, device=str(device))
