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
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # ZeRO-3 may have cut a parameter up: then it is empty, and says what shape it has as a whole.
    axes = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in trainable}
    matrices = [p for name, p in trainable if axes[name] >= 2 and not name.endswith("modulation")]
    vectors = [p for name, p in trainable if axes[name] < 2 or name.endswith("modulation")]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)
