"""The tiny decoder: the released file's names and its reference's arithmetic."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model.tiny_decoder import Clamp, MemBlock, TGrow, TinyDecoder, load_tiny_decoder


@pytest.fixture(scope="module")
def tiny() -> TinyDecoder:
    """Random weights; the released widths."""
    torch.manual_seed(0)  # the layers' own initialisation takes no generator
    return TinyDecoder().eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def released_names() -> Iterator[str]:
    """The decoder's names in taew2_1, written out by place."""
    yield from ("decoder.1.weight", "decoder.1.bias", "decoder.22.weight", "decoder.22.bias")
    for block in (3, 4, 5, 9, 10, 11, 15, 16, 17):
        for layer in (0, 2, 4):
            yield from (f"decoder.{block}.conv.{layer}.weight", f"decoder.{block}.conv.{layer}.bias")
    for grow in (7, 13, 19):
        yield from (f"decoder.{grow}.conv.weight", f"decoder.{grow + 1}.weight")


def test_names_and_shapes_are_those_of_the_released_file(tiny) -> None:
    state = tiny.state_dict()
    assert set(state) == set(released_names())
    assert state["decoder.1.weight"].shape == (256, 16, 3, 3)
    assert state["decoder.3.conv.0.weight"].shape == (256, 512, 3, 3)
    assert [state[f"decoder.{i}.conv.weight"].shape[0] for i in (7, 13, 19)] == [256, 256, 128]
    widths = [tuple(state[f"decoder.{i}.weight"].shape[:2]) for i in (8, 14, 20, 22)]
    assert widths == [(128, 256), (64, 128), (64, 64), (3, 64)]


def test_the_arithmetic_is_that_of_the_frame_parallel_reference(tiny) -> None:
    latents = noise(2, 16, 3, 2, 3)
    x = latents.transpose(1, 2).flatten(0, 1)  # as the reference: frames of all samples in the batch
    for layer in tiny.decoder:
        if isinstance(layer, MemBlock):
            frames = x.unflatten(0, (2, -1))
            past = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].flatten(0, 1)
            y = layer.conv(torch.cat([x, past], dim=1))
            x = torch.relu(y + x)
        elif isinstance(layer, TGrow):
            x = layer.conv(x).reshape(-1, x.shape[1], *x.shape[2:])
        else:
            x = torch.tanh(x / 3) * 3 if isinstance(layer, Clamp) else layer(x)
    expected = x.unflatten(0, (2, -1))[:, 3:].transpose(1, 2) * 2 - 1
    torch.testing.assert_close(tiny.decode_stream(latents, None)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_stream_keeps_nine_frames_of_features_however_long_the_block(tiny) -> None:
    kept = [tiny.decode_stream(noise(1, 16, f, 2, 3), None)[1] for f in (1, 5)]
    assert [len(state) for state in kept] == [9, 9]
    sizes = [sum(one.untyped_storage().nbytes() for one in state) for state in kept]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_released_file_loads_with_its_encoder_left_out(tiny, tmp_path, suffix: str) -> None:
    state, path = tiny.state_dict() | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / f"taew2_1.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    latents = noise(1, 16, 2, 2, 3)
    loaded = load_tiny_decoder(path)
    assert torch.equal(loaded.decode_stream(latents, None)[0], tiny.decode_stream(latents, None)[0])
    assert not any(isinstance(module, nn.Dropout) or module.training for module in loaded.modules())


def test_names_that_do_not_fit_are_said(tiny, tmp_path) -> None:
    state = {name: tensor for name, tensor in tiny.state_dict().items() if name != "decoder.4.conv.2.bias"}
    torch.save(state, tmp_path / "taew2_1.pth")
    with pytest.raises(ValueError, match=r"1 missing: decoder.4.conv.2.bias"):
        load_tiny_decoder(tmp_path / "taew2_1.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_tiny_decoder(tmp_path / "nowhere.pth")
