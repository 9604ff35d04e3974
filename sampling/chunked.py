"""The bidirectional method: image to first chunk, then context chunk and noise to next chunk, without an end."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from configs.errors import UserError
from data_pipeline.video import to_uint8, to_video
from model.inputs import condition, model_inputs
from model.layout import CHUNK_FRAMES, CHUNK_LATENTS
from model.noise import seeded_noise
from model.world import WorldModel
from sampling.denoising import Denoising, Rows, Velocity, guide, integrate


def rollout(
    world: WorldModel, prompt: Tensor, keyboard: Tensor, mouse: Tensor, seeds: Sequence[int], denoising: Denoising
) -> Iterator[Tensor]:
    """Chunk after chunk of (b 9 h w 3) uint8 frames that answer the actions, each as soon as it is made.

    `prompt` is an image (b 3 h w) in [-1, 1], which becomes the first frame, or the normalised latents (b c 3 h w) of
    a context chunk. `keyboard` (b n k) and `mouse` (b n 2) have one row per frame, n a multiple of 9, and begin with
    the prompt's own: the image is frame 0 of the first chunk, the context's 9 rows come before those of the first
    chunk. `seeds` (b): a sample's noise depends on its own seed alone, not on its neighbours in the batch.
    """
    frames = keyboard.shape[1]
    if frames % CHUNK_FRAMES or not len(prompt) == len(keyboard) == len(mouse) == len(seeds):
        raise UserError(
            f"rollout: {frames} action rows must be a multiple of {CHUNK_FRAMES}, with as many seeds as rows"
        )
    known = prompt if prompt.ndim == 5 else encode_frames(world, prompt[:, :, None])
    first = prompt if prompt.ndim == 4 or world.tower is None else first_picture(decode_frames(world, known))
    for chunk in range(known.shape[2] // CHUNK_LATENTS, frames // CHUNK_FRAMES):
        follows = known.shape[2] // CHUNK_LATENTS  # 1 if the chunk before this one is known, 0 at an image
        rows = slice(CHUNK_FRAMES * (chunk - follows), CHUNK_FRAMES * (chunk + 1))
        noise = draw_noise(known, CHUNK_LATENTS * (follows + 1), seeds, chunk)
        latents = denoise(world, known, noise, (keyboard[:, rows], mouse[:, rows]), denoising, world.look(first))
        known = latents[:, :, -CHUNK_LATENTS:]
        frames_made = decode_frames(world, known)
        first = first_picture(frames_made)
        yield frames_made


def draw_noise(like: Tensor, latents: int, seeds: Sequence[int], chunk: int) -> Tensor:
    """Noise (b c f h w) of `latents` frames with the other sizes of `like`; a function of each seed and the chunk."""
    _, channels, _, height, width = like.shape
    return seeded_noise((channels, latents, height, width), seeds, chunk).to(like.device)


@torch.inference_mode()
def denoise(
    world: WorldModel,
    known: Tensor,
    noise: Tensor,
    actions: Rows,
    denoising: Denoising,
    visual: Tensor | None = None,
) -> Tensor:
    """Clean latents (b c f h w) from `noise` of that shape; the first ones are `known` (b c m h w).

    `actions`: keyboard (b n k) and mouse (b n 2) of the frames of all f latents in the chunked layout. As in training,
    the slots of the known latents carry them at the current noise level, with one fixed noise, and the conditioning
    carries them clean; only the other slots are integrated. `visual` (b m c) are the tokens of the first known frame.
    """
    count = known.shape[2]
    cond = condition(torch.cat([known, torch.zeros_like(noise[:, :, count:])], dim=2), count)

    def answer(rows: Rows) -> Velocity:
        given = model_inputs(world.dit, rows, "chunked", cond, visual)
        return lambda x, timestep: world.dit(x, timestep, **given)

    made = actions[0].shape[1] - CHUNK_FRAMES * (count // CHUNK_LATENTS)  # rows of frames that are not known
    velocity = guide(answer, actions, made, denoising.guidance)
    return integrate(velocity, world.flow, noise, denoising.steps, known)


@torch.inference_mode()
def encode_frames(world: WorldModel, video: Tensor) -> Tensor:
    """Normalised latents (b c f h w) of `video` (b 3 n h w) in [-1, 1]."""
    return world.codec.encode(video)


@torch.inference_mode()
def decode_frames(world: WorldModel, latents: Tensor) -> Tensor:
    """Frames (b n h w 3) uint8 of one chunk's latents (b c f h w), decoded by themselves."""
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=world.dtype == torch.bfloat16):
        video = world.codec.decode(latents)
    return to_uint8(video)


def first_picture(frames: Tensor) -> Tensor:
    """The first of frames (b n h w 3) uint8 as a picture (b 3 h w) in [-1, 1]."""
    return to_video(frames[:, :1])[:, :, 0]
