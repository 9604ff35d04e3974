"""Sizes that no model can have and devices that are not here: one line by name, before anything is loaded."""

import json
from pathlib import Path

import pytest
from tiny_released import refusal, yamls
from tiny_world import change, generate, write_checkpoint, write_codec

from configs import load_config
from model.codec import CONFIG_FILE, load_codec, locate_codec
from model.config import ModelConfig
from model.limits import require_device
from model.world import WORLD_FILE, read_world_config

SIZES = [
    "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "img_dim", "action.heads_num",
    "action.hidden_size", "action.windows_size", "action.vae_time_compression_ratio", "action.keyboard_dim_in",
    "action.mouse_dim_in", "action.keyboard_hidden_dim", "action.mouse_hidden_dim", "causal.block",
]  # fmt: skip


@pytest.mark.parametrize("size", [0, -1, 10**15])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_a_model_that_cannot_be_is_named(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{name}={size} must lie between 1 and \d+$"):
        load_config(ModelConfig, [yamls("universal")[0], f"model.{name}={size}"])


@pytest.mark.parametrize(("name", "value"), [("model__num_heads", 0), ("model__dim", 10**12), ("model__ffn_dim", -8)])
def test_a_size_in_a_checkpoint_is_named_with_its_file(tmp_path: Path, name: str, value: int) -> None:
    folder = write_checkpoint(tmp_path)
    change(folder / WORLD_FILE, **{name: value})
    with pytest.raises(ValueError, match=rf"world\.yaml: {name.replace('__', '.')}={value} must"):
        read_world_config(folder)


@pytest.mark.parametrize("settings", ["width: 0", "channels: 100000", "memory_blocks: -1", "fine_width: 1000000000"])
def test_a_size_of_a_codec_that_cannot_be_is_named(tmp_path: Path, settings: str) -> None:
    write_codec(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(f"name: patch\n{settings}\n")
    with pytest.raises(ValueError, match=rf"config\.yaml: {settings.replace(': ', '=')} must"):
        load_codec(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("base_dim", 0, "width=0"),
        ("dim_mult", [1] * 60, "dim_mult"),
        ("dim_mult", "x", "dim_mult"),
        ("latents_std", [0] * 16, "latent_std"),
        ("latents_mean", [0], "latent_mean"),
        ("is_residual", True, "is_residual"),  # of another autoencoder
    ],
)
def test_a_setting_in_the_json_of_an_autoencoder_that_cannot_be_is_named(
    tmp_path: Path, name: str, value: object, ours: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", name: value}))
    with pytest.raises(ValueError, match=rf"config\.json.*{ours}"):
        locate_codec(tmp_path)


@pytest.mark.parametrize("device", ["foo", "meta", "", "cuda:x", "cpu:1", "xpu", "cuda:-1", "cuda:99", "CPU", "cuda:"])
def test_a_device_that_is_not_here_is_refused_before_the_checkpoint_is_read(
    tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tmp_path / "nowhere", tmp_path, f"device={device}") == 2
    said = capsys.readouterr().err.strip()
    assert "device" in said and "\n" not in said and "nowhere" not in said


def test_the_processor_is_always_there(capsys: pytest.CaptureFixture[str]) -> None:
    require_device("cpu")
    assert "device='tpu'" in refusal(capsys, "bench", yamls("universal")[0], "device=tpu", "height=32", "width=32")
