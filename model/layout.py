"""How the latents of a clip relate to its pixel frames."""

from typing import Literal

Layout = Literal["chunked", "continuous"]
CHUNK_FRAMES = 9  # pixel frames of one chunk of the chunked layout: 1 + 2 x 4
CHUNK_LATENTS = 3  # latents of such a chunk


def latent_ends(layout: Layout, latents: int) -> list[int]:
    """The last pixel frame that each of `latents` latent frames shows, counted from the clip's first frame.

    `continuous`: 0, 4, 8, 12, ...; `chunked` (9 frames encoded by themselves, 3 latents): 0, 4, 8, 9, 13, 17, ...
    """
    if layout == "continuous":
        return [4 * i for i in range(latents)]
    return [CHUNK_FRAMES * (i // CHUNK_LATENTS) + 4 * (i % CHUNK_LATENTS) for i in range(latents)]
