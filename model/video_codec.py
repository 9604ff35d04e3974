"""What every video codec offers: pixels to normalised latents and back, causal in time, whole or piece by piece."""

from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from configs.errors import UserError


class Codec(nn.Module):
    """A codec: `spatial` pixels per latent each way, `temporal` frames per latent after the first frame.

    Its own file holds the class, its config (a dataclass with `name`, `channels`, `spatial`, `temporal`) and how it is
    loaded; model/codec.py has a line for it.
    """

    Config: ClassVar[type]
    config: Any
    latent_mean: Tensor  # (c), of the latents before they are normalised
    latent_std: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents (b c f h/8 w/8) of a clip (b 3 n h w) in [-1, 1], n = 1 + 4 (f - 1).

        8 and 4 stand for `spatial` and `temporal`, here and below.
        """
        return self.encode_stream(video, None)[0]

    def encode_stream(self, video: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next latents (b c f h/8 w/8) and the state that the frames after them need; `state` None starts a clip.

        `video` (b 3 n h w) in [-1, 1] has 1 + 4 (f - 1) frames at the start and 4 f later. Piece by piece equals the
        whole.
        """
        raise NotImplementedError

    def require_whole_latents(self, video: Tensor, state: Any) -> None:
        """A UserError unless the frames of `video`, which follow those of `state`, are whole latents."""
        lead, spatial, temporal = int(state is None), self.config.spatial, self.config.temporal
        frames, height, width = video.shape[2:]
        if frames < 1 or (frames - lead) % temporal or height % spatial or width % spatial:
            given = f"{frames} frames of {height}x{width} px"
            raise UserError(f"{given}: a clip has {lead} + {temporal}k frames, multiples of {spatial} px")

    def decode(self, latents: Tensor) -> Tensor:
        """Video (b 3 1+4(f-1) h w), clamped to [-1, 1], of a whole clip of normalised latents (b c f h/8 w/8)."""
        return self.decode_stream(latents, None)[0].clamp(-1, 1)

    def decode_stream(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next frames, not clamped, and the state that the block after them needs; `state` None starts a clip.

        Latents (b c f h/8 w/8) give 4 f frames, or 1 + 4 (f - 1) at the start. Piece by piece equals the whole.
        """
        raise NotImplementedError

    @classmethod
    def third_party_settings(cls, path: Path) -> tuple[dict[str, Any], Path] | None:
        """What others wrote at `path`, if it is of this kind: its settings, and the file that holds them."""
        return None

    @classmethod
    def weight_files(cls, config: Any) -> dict[str, str]:
        """The files in its folder, by the setting that names each ("" if none does); the first one identifies it."""
        raise NotImplementedError

    @classmethod
    def load(cls, config: Any, folder: Path) -> Self:
        """The codec of `config` with the weights in `folder`, on the CPU."""
        raise NotImplementedError
