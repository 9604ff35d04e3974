"""CLIP's vision tower: both layouts, the right layers, and what a model with each kind of vision is told."""

import json
from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch
from safetensors.torch import save_file
from tiny_released import GOLDEN, TOWER, TOWER_JSON, TOWER_STATE, hf_state

from configs.errors import UserError
from model.vision import (
    TowerConfig,
    clip_pixels,
    image_conditions,
    image_tokens,
    load_tower,
    load_vision,
    make_tower,
    to_transformers,
)  # fmt: skip
from model.wan_codec import WanCodec, WanCodecConfig, load_vae

IMAGES = torch.rand(2, 3, 20, 36, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def tower():
    return load_tower(TOWER_STATE, TOWER, "the fixture").requires_grad_(False)


def test_the_released_file_has_392_vision_tensors_of_which_377_are_used() -> None:
    with torch.device("meta"):
        state = make_tower(TowerConfig()).state_dict()
    layer = [name for name in TOWER_STATE if name.startswith("transformer.0.")]
    names = {name for name in TOWER_STATE if not name.startswith(("transformer.", "post_norm.", "head"))}
    names |= {name.replace(".0.", f".{i}.", 1) for name in layer for i in range(31)}
    assert len(names) == 377 and len(layer) == 12  # beside them: layer 31, post_norm (2), head
    assert to_transformers({name: torch.zeros(3, 1) for name in names}).keys() == state.keys()
    assert state["embeddings.position_embedding.weight"].shape == (257, 1280)


def test_the_official_file_loads_with_its_text_tower_left_out(tower, tmp_path) -> None:
    state = {f"visual.{name}": tensor for name, tensor in TOWER_STATE.items()}
    state |= {"textual.token_embedding.weight": torch.zeros(4, 4), "log_scale": torch.zeros(1)}
    assert torch.equal(load_tower(state, TOWER, "file")(IMAGES), tower(IMAGES))
    torch.save(state, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match=r"clip.pth holds no such CLIP vision tower: .* misshapen"):
        load_vision(tmp_path / "clip.pth")  # by itself such a file has the released sizes


def test_the_layout_of_transformers_gives_the_same_tokens(tower, tmp_path) -> None:
    save_file(hf_state(tower), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TOWER_JSON))
    loaded = load_vision(tmp_path)
    assert torch.equal(loaded(IMAGES), tower(IMAGES))
    for name, value in (("hidden_act", "quick_gelu"), ("hidden_size", 0), ("patch_size", "x"), ("image_size", 10**9)):
        (tmp_path / "config.json").write_text(json.dumps(TOWER_JSON | {name: value}))
        with pytest.raises(UserError, match=r"config\.json") as error:
            load_vision(tmp_path)
        assert "\n" not in str(error.value)


def test_the_tower_in_a_library_model_gives_the_same_tokens(tower) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = asdict(replace(TOWER, num_hidden_layers=3))
    whole = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval().requires_grad_(False)
    loaded = load_tower(whole.state_dict(), TOWER, "a model")
    hidden = whole(pixel_values=clip_pixels(IMAGES, 28), output_hidden_states=True).hidden_states
    assert hidden is not None
    torch.testing.assert_close(loaded(IMAGES), hidden[-2], rtol=1e-4, atol=1e-4)


def test_a_model_is_told_what_its_kind_of_vision_takes(tower) -> None:
    tokens, pooled = (image_tokens(tower, IMAGES, kind) for kind in ("tokens", "pooled"))
    assert tokens is not None and pooled is not None
    assert tokens.shape == (2, 17, 36) and pooled.shape == (2, 1, 36)
    assert torch.equal(pooled[:, 0], tokens[:, 0])
    assert image_tokens(None, IMAGES, "none") is None
    with pytest.raises(ValueError, match="needs the weights"):
        image_tokens(None, IMAGES, "tokens")


def test_a_picture_has_the_same_tokens_alone_and_in_a_batch(tower) -> None:
    torch.testing.assert_close(tower(IMAGES)[1:], tower(IMAGES[1:]), rtol=1e-4, atol=1e-4)


def test_names_and_shapes_that_do_not_fit_are_said(tower) -> None:
    state = {name: tensor for name, tensor in TOWER_STATE.items() if name != "transformer.1.norm2.bias"}
    state |= {"transformer.0.attn.to_qkv.bias": torch.zeros(36), "extra": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_tower(state, TOWER, "clip.pth")
    for part in ("layers.1.layer_norm2.bias", "layers.0.self_attn.q_proj.bias (12,) for (36,)", "extra"):
        assert part in str(error.value)
    other = {name: tensor for name, tensor in hf_state(tower).items() if not name.endswith("layers.0.mlp.fc1.bias")}
    with pytest.raises(ValueError, match=r"1 missing: encoder.layers.0.mlp.fc1.bias"):
        load_tower(other, TOWER, "model.safetensors")


def test_conditions_come_block_by_block_without_an_end() -> None:
    config = WanCodecConfig(width=4)
    codec = WanCodec(config, load_vae(config, GOLDEN / "vae.weights.safetensors")).eval()
    image = IMAGES[..., :16, :24]
    whole = next(image_conditions(codec, image, 7))
    assert whole.shape == (2, 20, 7, 2, 3)
    blocks = list(islice(image_conditions(codec, image, 1), 7))
    torch.testing.assert_close(torch.cat(blocks, dim=2), whole, rtol=1e-4, atol=1e-4)
    assert whole[:, :4, 0].eq(1).all() and whole[:, :4, 1:].eq(0).all()
