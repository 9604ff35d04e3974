"""Wan's autoencoder against its reference, in both layouts, with either decoder, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from model.codec import codec_hash, load_codec
from model.third_party import diffusers_names
from model.tiny_decoder import TinyDecoder
from model.wan_codec import WanCodec, WanCodecConfig, make_vae
from model.weights import load_weights

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 4  # of the golden weights
TINY = WanCodecConfig(width=WIDTH)


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    """Random weights under the official names."""
    return load_weights(GOLDEN / "vae.weights.safetensors")


@pytest.fixture(scope="module")
def folder(official, tmp_path_factory) -> Path:
    """A folder of ours: config.yaml and the official file."""
    folder = tmp_path_factory.mktemp("wan")
    torch.save(official, folder / "Wan2.1_VAE.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "wan", "width": WIDTH}))
    return folder


@pytest.fixture(scope="module")
def codec(folder) -> WanCodec:
    codec = load_codec(folder)
    assert isinstance(codec, WanCodec)
    return codec.requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_released_file_has_these_names_and_no_others(official) -> None:
    with torch.device("meta"):
        real = make_vae(WanCodecConfig()).state_dict()
    assert set(diffusers_names("vae", official).values()) == set(real) and len(real) == len(official) == 194
    assert sum(tensor.numel() for tensor in real.values()) == 126_892_531


def test_the_official_and_the_diffusers_layout_give_the_same_codec(codec, official, tmp_path) -> None:
    state = {name: official[theirs].clone() for theirs, name in diffusers_names("vae", official).items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    given = {"_class_name": "AutoencoderKLWan", "base_dim": WIDTH, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(given))
    other = load_codec(tmp_path)
    video, latents = noise(1, 3, 5, 16, 24), noise(1, 16, 2, 2, 3)
    assert torch.equal(codec.encode(video), other.encode(video))
    assert torch.equal(codec.decode(latents), other.decode(latents))


def test_more_latents_at_once_change_nothing_but_memory(codec, folder) -> None:
    video, latents = noise(1, 3, 17, 16, 24), noise(1, 16, 5, 2, 3)
    one_by_one = load_codec(folder, "piece_latents=1")
    torch.testing.assert_close(one_by_one.encode(video), codec.encode(video), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one_by_one.decode(latents), codec.decode(latents), rtol=1e-4, atol=1e-4)


def test_bf16_decodes_about_the_same(codec) -> None:
    latents = noise(1, 16, 3, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        halved = codec.decode(latents)
    assert halved.dtype == torch.float32
    assert (halved - codec.decode(latents)).abs().mean() < 0.02


def test_the_tiny_decoder_takes_the_place_of_the_full_one(folder, codec, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "wan")
    torch.save(TinyDecoder().state_dict(), tmp_path / "wan" / "taew2_1.pth")
    tiny = load_codec(tmp_path / "wan", "decoder=tiny")
    assert isinstance(tiny, WanCodec) and tiny.decoder is None
    video = noise(1, 3, 5, 16, 24)
    assert torch.equal(tiny.encode(video), codec.encode(video))
    assert tiny.decode(noise(1, 16, 3, 2, 3)).shape == (1, 3, 9, 16, 24)
    assert codec_hash(tmp_path / "wan") == codec_hash(folder)


def test_the_tiny_decoder_without_its_file_is_refused(folder) -> None:
    with pytest.raises(FileNotFoundError, match=r"taew2_1\.pth"):
        load_codec(folder, "decoder=tiny")
    with pytest.raises(ValueError, match="full, tiny"):
        load_codec(folder, "decoder=small")


def test_names_and_shapes_that_do_not_fit_are_said(official, folder, tmp_path) -> None:
    state = {name: tensor for name, tensor in official.items() if name != "decoder.middle.0.residual.2.weight"}
    state |= {"decoder.extra.weight": torch.zeros(1), "conv2.bias": torch.zeros(7)}
    shutil.copy(folder / "config.yaml", tmp_path)
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError) as error:
        load_codec(tmp_path)
    for part in ("decoder.mid_block.resnets.0.conv1.weight", "decoder.extra.weight", "quant_conv.bias (7,) for (16,)"):
        assert part in str(error.value)


def test_a_path_with_nothing_there_is_refused(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        with pytest.raises(FileNotFoundError, match=r"Wan2\.1_VAE\.pth"):
            load_codec(path)


def test_importing_the_model_imports_neither_library() -> None:
    code = "import sys, model.codec, model.vision; print({'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
