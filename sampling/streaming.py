"""Rollouts of a causal model: block after block, each answering its actions and reading the past from caches."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.video import to_uint8
from model.inputs import condition, known_at, model_inputs
from model.noise import seeded_noise
from model.vision import image_conditions
from model.world import WorldModel
from sampling.denoising import Denoising, Rows, Velocity, cfg, denoise_in_few_steps, integrate
from sampling.rollout import Rollout, decoding


class StreamingRollout(Rollout):
    """A rollout in blocks of latents, with key/value caches, the decoder's state and the newest actions."""

    @torch.inference_mode()
    def __init__(self, world: WorldModel, prompt: Tensor, seeds: Sequence[int], denoising: Denoising) -> None:
        super().__init__(world, prompt, seeds, denoising)
        image, (height, width) = prompt[:, :, 0] if prompt.ndim == 5 else prompt, prompt.shape[-2:]
        spatial, causal, action = world.codec.config.spatial, world.dit.config.causal, world.dit.config.action
        self.cache = world.dit.make_cache(len(image), height // spatial, width // spatial, world.look(image))
        assert causal is not None  # make_cache refuses a model that is not causal
        self.causal, self.temporal = causal, world.codec.config.temporal
        self.frames_due = 1 + self.temporal * (causal.block - 1)  # of the first block; every later one has more
        self._past_rows = action.window if action else 0
        if prompt.ndim == 5:
            frames, later = prompt.shape[2], self.temporal * causal.block
            if (frames - self.frames_due) % later:
                raise UserError(f"prompt: {frames} frames, but blocks have {self.frames_due} frames, then {later} each")
            self._prompt = list(world.codec.encode(prompt).float().split(causal.block, dim=2))
        self._decoder_state: Any = None
        self._conditions = _conditions(world, image, causal.unknown, causal.block)
        self._cond = next(self._conditions)  # of the next block
        # A model whose prompt comes as grey conditioning makes even the first latent itself, as upstream does.
        grey = causal.unknown == "grey"
        self._known: Tensor | None = None if grey else world.codec.encode(image[:, :, None]).float()

    def _denoise(self, actions: Rows) -> Tensor:
        if self._known is not None and self._known.shape[2] == self.causal.block:
            return self._known  # the picture is the whole block

        def velocity(actions: Rows) -> Velocity:
            inputs = self._inputs(actions)
            return lambda x, timestep: self.world.dit(x, timestep, **inputs, cache=self.cache)

        guided, flow = cfg(velocity, actions, self.frames_due, self.denoising.guidance), self.world.flow
        if self.denoising.few_steps:
            return denoise_in_few_steps(guided, flow, self._noise, self.denoising.few_steps, self._known)
        return integrate(guided, flow, self._noise(0), self.denoising.steps, self._known)

    def _finish(self, latents: Tensor, actions: Rows) -> Tensor:
        past, sigma = self._as_context(latents)
        timestep, inputs = self.world.flow.config.train_steps * sigma, self._inputs(actions)
        self._unsettled = partial(self.world.dit, past, timestep, **inputs, cache=self.cache, update_cache=True)
        self._known, self._cond = None, next(self._conditions)
        if self.causal.unknown == "last":
            self._cond = known_at(past[:, :, -1:].expand_as(past), sigma[:, None].expand(-1, past.shape[2]))
        self.frames_due = self.temporal * self.causal.block
        with decoding(self.world):
            video, self._decoder_state = self.world.codec.decode_stream(latents, self._decoder_state)
        return to_uint8(video.clamp(-1, 1))

    def _as_context(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """A finished block's latents (b c f h w) as the cache gets them, and their levels (b)."""
        flow, level = self.world.flow, self.denoising.context_noise
        level = self.causal.context_noise if level is None else level
        sigma = torch.full((len(latents),), level, device=latents.device)
        return flow.add_noise(latents, self._noise(-1), sigma) if level else latents, sigma

    def _inputs(self, actions: Rows) -> dict[str, Tensor | None]:
        """The model's inputs for the next block; `actions` are those of the past, then of the block's frames."""
        # The first latent of a later block ends `temporal` frames into that block.
        offset = actions[0].shape[1] - self.frames_due + (self.temporal - 1 if self.pieces else 0)
        return model_inputs(self.world.dit, actions, "continuous", self._cond, offset=offset)

    def _noise(self, level: int) -> Tensor:
        """Noise (b c f h w) that depends on each seed, the block and the level (-1: of the context)."""
        (_, rows, columns), (_, p, q) = self.cache.grid, self.world.dit.config.patch_size
        shape = (self.world.dit.config.out_dim, self.causal.block, rows * p, columns * q)
        return seeded_noise(shape, self.seeds, self.pieces, level + 1).to(self.world.device)


def _conditions(world: WorldModel, image: Tensor, fill: str, block: int) -> Iterator[Tensor]:
    """The conditioning (b 4+c f h w) of each block: the picture in the first, then nothing known."""
    if fill != "grey":
        known = world.codec.encode(image[:, :, None]).float()
        if fill == "last":  # each later block is given the latent before it instead
            yield from repeat(known_at(known.expand(-1, -1, block, -1, -1), known.new_zeros(len(known), block)))
        latents = torch.cat([known, torch.zeros_like(known).expand(-1, -1, block - 1, -1, -1)], dim=2)
        yield condition(latents, 1)
        unknown = condition(torch.zeros_like(latents), 0)
    else:
        # The encoder remembers finitely many frames: once grey gives what it gave before, it always will.
        unknown = None
        for cond in image_conditions(world.codec, image, block):
            if unknown is not None and torch.equal(cond, unknown):
                break
            unknown = cond
            yield cond
    assert unknown is not None
    while True:
        yield unknown
