"""Small stand-ins for what is released: official weights of each variant, and a CLIP vision tower."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs import load_config
from configs.cli import run
from model.__main__ import VERBS
from model.action_dit import ActionDiT
from model.config import ActionDiTConfig, ModelConfig
from model.vision import TowerConfig
from tests.parity.fixtures import read_fixtures

GOLDEN = Path(__file__).parent / "golden"
FIXTURE = next(fixture for fixture in read_fixtures(GOLDEN) if fixture.case == "clip")
TOWER_STATE = {name.removeprefix("sd."): tensor for name, tensor in FIXTURE.tensors.items() if name.startswith("sd.")}
TOWER = TowerConfig(
    hidden_size=36, intermediate_size=144, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7
)
TOWER_JSON = {**asdict(TOWER), "model_type": "clip_vision_model", "num_hidden_layers": 3}  # of `hf_state`
CONFIGS = Path(__file__).parent.parent / "configs"
VARIANTS = {  # our file, the game, and what is published: numbers, tensors, bytes per number
    "foundation": ("matrix_game_2", "universal", 1_824_405_824, 1399, torch.bfloat16),
    "universal": ("matrix_game_2_universal_distilled", "universal", 1_619_242_304, 1114, torch.float32),
    "gta_drive": ("matrix_game_2_gta_drive_distilled", "gta_drive", 1_619_238_464, 1114, torch.float32),
    "templerun": ("matrix_game_2_templerun_distilled", "templerun", 1_508_715_584, 964, torch.float32),
}
SMALL = [
    "model.dim=32", "model.ffn_dim=48", "model.num_heads=2", "model.num_layers=3", "model.freq_dim=16",
    "model.img_dim=24", "model.action.blocks=[0,1]", "model.action.heads_num=2", "model.action.hidden_size=8",
    "model.action.keyboard_hidden_dim=16", "model.action.mouse_hidden_dim=16",
]  # fmt: skip


def yamls(variant: str) -> list[str]:
    model, game, *_ = VARIANTS[variant]
    return [str(CONFIGS / "models" / f"{model}.yaml"), str(CONFIGS / "games" / f"{game}.yaml")]


def model_of(variant: str, *args: str) -> ActionDiTConfig:
    return load_config(ModelConfig, [yamls(variant)[0], *args]).model


def shapes(config: ActionDiTConfig) -> dict[str, Tensor]:
    """The tensors of a file without their data."""
    with torch.device("meta"):
        return ActionDiT(config).state_dict()


def random_state(config: ActionDiTConfig, prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(spec.shape, generator=generator).to(dtype) for name, spec in shapes(config).items()
    }


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8))
        for name in one
    )


def model_command(*args: str) -> int:
    return run("model", VERBS, list(args))


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert model_command(*args) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def hf_state(tower) -> dict[str, torch.Tensor]:
    """The tower under transformers' names, with the layer and the norm that are not used."""
    state = {f"vision_model.{name}": tensor.clone() for name, tensor in tower.tower.state_dict().items()}
    last = {name.replace("layers.1.", "layers.2."): tensor + 1 for name, tensor in state.items() if "layers.1." in name}
    unused = {"vision_model.post_layernorm.weight": torch.ones(36), "text_model.x": torch.ones(1)}
    return state | last | unused
