"""How the latents of a clip relate to its pixel frames, and what stands for latents that are not given."""

from typing import Literal

Layout = Literal["chunked", "continuous"]
CHUNK_FRAMES = 9  # pixel frames of one chunk of the chunked layout: 1 + 2 x 4
CHUNK_LATENTS = 3  # latents of such a chunk

# The conditioning of latents that are not given: zeros, or the codec's latents of grey frames (the released models).
CondFill = Literal["zeros", "grey"]


def latent_ends(layout: Layout, latents: int, frames_per_latent: int) -> list[int]:
    """The last pixel frame that each of `latents` latent frames shows, counted from the clip's first frame.

    With 4 frames per latent, `continuous`: 0, 4, 8, 12, ...; `chunked` (9 frames encoded by themselves, 3 latents):
    0, 4, 8, 9, 13, 17, ...
    """
    if layout == "continuous":
        return [frames_per_latent * i for i in range(latents)]
    return [CHUNK_FRAMES * (i // CHUNK_LATENTS) + frames_per_latent * (i % CHUNK_LATENTS) for i in range(latents)]
