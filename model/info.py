"""`python -m model info`: the tensors of a model and how many numbers its parts hold."""

import re
from collections import Counter

import torch

from model.action_dit import ActionDiT
from model.config import ModelConfig


def info(config: ModelConfig) -> None:
    """Parameters per part, and the names and shapes of all tensors, of a model: FILE.yaml key=value ..."""
    with torch.device("meta"):
        state = ActionDiT(config.model).state_dict()
    rows, parts = Counter[tuple[str, str]](), Counter[str]()
    for name, tensor in state.items():
        general = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)  # equal blocks together
        rows[general, "x".join(map(str, tensor.shape))] += 1
        part = re.findall(r"^(?:blocks\.{i}\.)?\w+", general)[0]
        parts[part.replace("{i}.", "")] += tensor.numel()
    for (name, shape), blocks in rows.items():
        print(f"{name:<58} {f'x {blocks}' if name.startswith('blocks.') else '':<8} {shape}")
    print()
    for part, count in [*parts.items(), ("total", parts.total())]:
        print(f"{part:<58} {count:>16,}{f' in {len(state)} tensors' if part == 'total' else ''}")
