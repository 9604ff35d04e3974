"""A transformer of a few thousand weights, and random inputs for it."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from configs import load_config
from model.action_dit import ActionDiT
from model.config import ActionDiTConfig, ModelConfig
from model.cost import random_inputs
from model.masks import CausalConfig

MODELS = Path(__file__).parent.parent / "configs" / "models"
SMOKE = str(MODELS / "smoke.yaml")
TINY = load_config(ModelConfig, [SMOKE]).model
CAUSAL = replace(TINY, attention="sdpa", causal=CausalConfig(block=3, window=6))
H, W = 4, 6  # of latents


def awake(config: ActionDiTConfig, seed: int = 0) -> ActionDiT:
    """A model in which no tensor is zero: what upstream starts at zero is random too."""
    generator = torch.Generator().manual_seed(seed)
    dit = ActionDiT(config, generator)
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2, generator=generator)
    return dit


def inputs(config: ActionDiTConfig, b: int = 1, f: int = 3, h: int = H, w: int = W) -> dict[str, Tensor]:
    """A clip of `f` latents, with a timestep per frame for a causal model."""
    torch.manual_seed(f)
    return random_inputs(config, b, f, h, w, torch.device("cpu"))


def frames(given: dict[str, Tensor], which: slice) -> dict[str, Tensor]:
    """Some latent frames of such a clip."""
    axis = {"x": 2, "cond": 2, "timestep": 1, "keyboard": 1, "mouse": 1}
    cut = {name: tensor.movedim(axis[name], 0)[which] for name, tensor in given.items() if name in axis}
    return {name: tensor.movedim(0, axis[name]) for name, tensor in cut.items()}
