"""The optimizer, and the learning rate as a pure function of the step."""

import torch
from torch import nn

from train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`: linear warm-up, constant, linear decay to zero."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = min(1.0, (steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return config.learning_rate * warmup * decay


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable weights; weight decay on matrices, none on biases, norms and modulations."""
    matrices, vectors = [], []
    for name, p in model.named_parameters():
        axes = len(getattr(p, "ds_shape", p.shape))  # ZeRO-3 leaves `p` empty, and its whole shape in ds_shape
        if p.requires_grad:
            (matrices if axes >= 2 and not name.endswith("modulation") else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)
