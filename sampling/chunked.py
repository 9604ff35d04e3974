"""Rollouts of a bidirectional model: image to first chunk, then context chunk and noise to next chunk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.video import to_video
from model.inputs import condition, model_inputs
from model.layout import CHUNK_FRAMES, CHUNK_LATENTS
from model.noise import seeded_noise
from model.world import WorldModel
from sampling.denoising import Denoising, Rows, Velocity, cfg, integrate
from sampling.rollout import Rollout, decode_frames


class ChunkedRollout(Rollout):
    """A rollout in chunks of 9 frames, each of which sees the chunk before it."""

    frames_due = _past_rows = CHUNK_FRAMES

    @torch.inference_mode()
    def __init__(self, world: WorldModel, prompt: Tensor, seeds: Sequence[int], denoising: Denoising) -> None:
        super().__init__(world, prompt, seeds, denoising)
        if prompt.ndim == 4:
            self._first_frame = prompt  # (b 3 h w), of the newest chunk
            self._known = world.codec.encode(prompt[:, :, None])  # the picture, then the newest chunk
        elif prompt.shape[2] % CHUNK_FRAMES:
            raise UserError(f"prompt: {prompt.shape[2]} frames must be a multiple of {CHUNK_FRAMES}")
        else:
            self._prompt = [world.codec.encode(chunk) for chunk in prompt.split(CHUNK_FRAMES, dim=2)]

    def _denoise(self, actions: Rows) -> Tensor:
        # As in training, the slots of the known latents carry them at the current noise level, with one fixed noise,
        # and the conditioning carries them clean; only the other slots are integrated.
        latents = 2 * CHUNK_LATENTS if self.pieces else CHUNK_LATENTS  # the chunk before it is known
        _, channels, count, height, width = self._known.shape
        noise = seeded_noise((channels, latents, height, width), self.seeds, self.pieces).to(self._known.device)
        cond = condition(torch.cat([self._known, noise[:, :, count:]], dim=2), count)
        image_tokens = self.world.look(self._first_frame)

        def velocity(actions: Rows) -> Velocity:
            inputs = model_inputs(self.world.dit, actions, "chunked", cond, image_tokens)
            return lambda x, timestep: self.world.dit(x, timestep, **inputs)

        guided = cfg(velocity, actions, CHUNK_FRAMES, self.denoising.guidance)
        clip = integrate(guided, self.world.flow, noise, self.denoising.steps, self._known)
        return clip[:, :, -CHUNK_LATENTS:]

    def _finish(self, latents: Tensor, actions: Rows) -> Tensor:
        self._known, frames = latents, decode_frames(self.world, latents)
        self._first_frame = to_video(frames[:, :1])[:, :, 0]
        return frames
