"""Rollouts of a causal model: block after block, each answering its actions and reading the past from caches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.video import to_uint8
from model.inputs import condition, model_inputs
from model.noise import seeded_noise
from model.vision import image_conditions
from model.world import WorldModel
from sampling.denoising import Denoising, Rows, Velocity, cfg, denoise_in_few_steps, integrate
from sampling.rollout import require_actions, require_prompt, with_past


class StreamingRollout:
    """A `Rollout` in blocks of latents, with key/value caches, the decoder's state and the newest actions."""

    @torch.inference_mode()
    def __init__(self, world: WorldModel, prompt: Tensor, seeds: Sequence[int], denoising: Denoising) -> None:
        image, (height, width) = require_prompt(world, prompt, seeds), prompt.shape[-2:]
        spatial, causal = world.codec.config.spatial, world.dit.config.causal
        self.cache = world.dit.make_cache(len(image), height // spatial, width // spatial, world.look(image))
        assert causal is not None  # make_cache refuses a model that is not causal
        self.world, self.seeds, self.denoising, self.causal = world, tuple(seeds), denoising, causal
        self.temporal, self.blocks = world.codec.config.temporal, 0
        self._prompt = self._encode_blocks(prompt) if prompt.ndim == 5 else []  # blocks that the next steps return
        self._decoder_state: Any = None
        self._past: Rows | None = None  # the newest rows of keyboard and mouse
        self._conditions = _conditions(world, image, causal.unknown, causal.block)
        # A model whose prompt comes as grey conditioning makes even the first latent itself, as upstream does.
        grey = causal.unknown == "grey"
        self._known: Tensor | None = None if grey else world.codec.encode(image[:, :, None]).float()

    @property
    def frames_due(self) -> int:
        """Frames of the next block: 9 at the start, then 12, for blocks of three latents."""
        return self.temporal * self.causal.block - (self.temporal - 1 if self.blocks == 0 else 0)

    @torch.inference_mode()
    def step(self, keyboard: Tensor, mouse: Tensor) -> Tensor:
        """The next block of frames as in `Rollout`."""
        actions = require_actions(self.world, (keyboard, mouse), len(self.seeds), self.frames_due)
        actions = with_past(self._past, actions)
        cond = next(self._conditions)
        latents = self._prompt.pop(0) if self._prompt else self._denoise(actions, cond)
        self._fill_cache(latents, actions, cond)
        self.blocks, self._known = self.blocks + 1, None
        action = self.world.dit.config.action
        past = max(0, actions[0].shape[1] - (action.window if action else 0))
        self._past = actions[0][:, past:], actions[1][:, past:]
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.world.dtype == torch.bfloat16):
            video, self._decoder_state = self.world.codec.decode_stream(latents, self._decoder_state)
        return to_uint8(video.clamp(-1, 1))

    def _denoise(self, actions: Rows, cond: Tensor) -> Tensor:
        """A new block of latents (b c f h w)."""

        def velocity(actions: Rows) -> Velocity:
            inputs = self._inputs(actions, cond)
            return lambda x, timestep: self.world.dit(x, timestep, **inputs, cache=self.cache)

        guided, flow = cfg(velocity, actions, self.frames_due, self.denoising.guidance), self.world.flow
        if self.denoising.few_steps:
            return denoise_in_few_steps(guided, flow, self._noise, self.denoising.few_steps, self._known)
        return integrate(guided, flow, self._noise(0), self.denoising.steps, self._known)

    def _fill_cache(self, latents: Tensor, actions: Rows, cond: Tensor) -> None:
        """One more pass over the finished block."""
        flow, level = self.world.flow, self.denoising.context_noise
        level = self.causal.context_noise if level is None else level
        sigma = torch.full((len(latents),), level, device=latents.device)
        x = flow.add_noise(latents, self._noise(-1), sigma) if level else latents
        timestep = flow.config.train_steps * sigma
        self.world.dit(x, timestep, **self._inputs(actions, cond), cache=self.cache, update_cache=True)

    def _inputs(self, actions: Rows, cond: Tensor) -> dict[str, Tensor | None]:
        """What the model is given for the next block, `actions` being those of the past and of its frames."""
        # A later block's first latent ends with the last of its own frames.
        offset = actions[0].shape[1] - self.frames_due + (self.temporal - 1 if self.blocks else 0)
        return model_inputs(self.world.dit, actions, "continuous", cond, offset=offset)

    def _noise(self, level: int) -> Tensor:
        """Noise (b c f h w) that depends on each seed, the block and the level (-1: of the context)."""
        (_, rows, columns), (_, p, q) = self.cache.grid, self.world.dit.config.patch_size
        shape = (self.world.dit.config.out_dim, self.causal.block, rows * p, columns * q)
        return seeded_noise(shape, self.seeds, self.blocks, level + 1).to(self.world.device)

    def _encode_blocks(self, clip: Tensor) -> list[Tensor]:
        """Latents (b c f h w) of the blocks of `clip` (b 3 n h w)."""
        frames, block = clip.shape[2], self.causal.block
        if (frames - 1) % self.temporal or (1 + (frames - 1) // self.temporal) % block:
            raise UserError(
                f"prompt: {frames} frames are not a whole number of blocks of {block} latents; the first block has "
                f"{self.temporal * (block - 1) + 1} frames, every later one {self.temporal * block}"
            )
        return list(self.world.codec.encode(clip).float().split(block, dim=2))


def _conditions(world: WorldModel, image: Tensor, fill: str, block: int) -> Iterator[Tensor]:
    """The conditioning (b 4+c f h w) of each block: the picture in the first, then nothing known."""
    if fill == "zeros":
        known = world.codec.encode(image[:, :, None]).float()
        latents = torch.cat([known, torch.zeros_like(known).expand(-1, -1, block - 1, -1, -1)], dim=2)
        yield condition(latents, 1)
        nothing = condition(torch.zeros_like(latents), 0)
    else:
        # The encoder remembers finitely many frames: once grey gives what it gave before, it always will.
        nothing = None
        for cond in image_conditions(world.codec, image, block):
            if nothing is not None and torch.equal(cond, nothing):
                break
            nothing = cond
            yield cond
    assert nothing is not None
    while True:
        yield nothing
