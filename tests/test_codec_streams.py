"""What holds for every codec: causal in time, piece by piece as whole, in a memory that does not grow."""

from pathlib import Path

import pytest
import torch
from tiny_world import fitted_codec

from model.patch_codec import PatchCodec
from model.tiny_decoder import TinyDecoder
from model.video_codec import Codec
from model.wan_codec import WanCodec, WanCodecConfig, load_vae

WAN = WanCodecConfig(width=4)
WEIGHTS = Path(__file__).parent / "golden" / "vae.weights.safetensors"


CODECS = {
    "patch": fitted_codec,
    "wan": lambda: WanCodec(WAN, load_vae(WAN, WEIGHTS)),
    "wan with the tiny decoder": lambda: WanCodec(WAN, load_vae(WAN, WEIGHTS), TinyDecoder()),
}


@pytest.fixture(scope="module", params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    torch.manual_seed(0)  # the layers' own initialisation takes no generator
    codec = CODECS[request.param]().eval()
    if isinstance(codec, PatchCodec):
        torch.nn.init.normal_(codec.leave.weight, std=0.1)  # at its start the decoder adds nothing
    return codec.requires_grad_(False)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("cuts", [(1, 4, 4, 4), (9, 4), (5, 8)])
def test_encoding_block_by_block_equals_the_whole(codec: Codec, cuts: tuple[int, ...]) -> None:
    video, state, parts = noise(2, 3, 13, 16, 24), None, []
    for block in video.split(cuts, dim=2):
        latents, state = codec.encode_stream(block, state)
        parts.append(latents)
    torch.testing.assert_close(torch.cat(parts, dim=2), codec.encode(video), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (3, 3), (1, 1, 1, 1, 1, 1), (6,)])
def test_decoding_block_by_block_equals_the_whole(codec: Codec, cuts: tuple[int, ...]) -> None:
    latents, state, parts = noise(2, 16, 6, 2, 3), None, []
    for block in latents.split(cuts, dim=2):
        video, state = codec.decode_stream(block, state)
        parts.append(video.clamp(-1, 1))
    torch.testing.assert_close(torch.cat(parts, dim=2), codec.decode(latents), rtol=1e-4, atol=1e-4)


def test_a_decoded_frame_never_sees_a_later_latent(codec: Codec) -> None:
    latents = noise(1, 16, 4, 2, 3)
    changed = latents.clone()
    changed[:, :, 3] += 1
    before, after = codec.decode(latents), codec.decode(changed)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])


def test_an_encoded_latent_never_sees_a_later_frame(codec: Codec) -> None:
    video = noise(1, 3, 9, 16, 24)
    torch.testing.assert_close(codec.encode(video)[:, :, :2], codec.encode(video[:, :, :5]), rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_same_alone_and_in_a_batch(codec: Codec) -> None:
    video, latents = noise(3, 3, 9, 16, 24), noise(3, 16, 3, 2, 3)
    for run, batch in ((codec.encode, video), (codec.decode, latents)):
        alone = torch.cat([run(sample) for sample in batch.split(1)])
        torch.testing.assert_close(run(batch), alone, rtol=1e-4, atol=1e-4)


def test_a_state_can_be_continued_twice(codec: Codec) -> None:
    latents = noise(1, 16, 4, 2, 3)
    _, state = codec.decode_stream(latents[:, :, :2], None)
    first, _ = codec.decode_stream(latents[:, :, 2:], state)
    again, _ = codec.decode_stream(latents[:, :, 2:], state)
    assert torch.equal(first, again)


def test_the_state_of_a_stream_does_not_grow(codec: Codec) -> None:
    sizes, encoding, decoding = [], None, None
    for block in range(4):
        _, encoding = codec.encode_stream(noise(1, 3, 9 if block == 0 else 12, 16, 24), encoding)
        _, decoding = codec.decode_stream(noise(1, 16, 3, 2, 3), decoding)
        kept = [tensor for tensor in (*encoding, *decoding) if isinstance(tensor, torch.Tensor)]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept))
    assert len(set(sizes[1:])) == 1


@pytest.mark.parametrize("shape", [(8, 16, 24), (2, 16, 24), (0, 16, 24), (5, 12, 24)])
def test_a_clip_of_another_shape_is_refused(codec: Codec, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"a clip has 1 \+ 4k frames"):
        codec.encode(noise(1, 3, *shape))
