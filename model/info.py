"""`python -m model info`: the tensors of a model and how many numbers its parts hold."""

import re
from collections import Counter

import torch
from torch import Tensor

from model.action_dit import ActionDiT
from model.config import ModelConfig
from model.official import ranges


def info(config: ModelConfig) -> None:
    """Parameters per part, and the names and shapes of all tensors, of a model: FILE.yaml key=value ..."""
    with torch.device("meta"):
        state = ActionDiT(config.model).state_dict()
    for name, where, shape in tensor_table(state):
        print(f"{name:<58} {where:<8} {shape}")
    print()
    for part, count in count_by_part(state).items():
        print(f"{part:<58} {count:>16,}")
    print(f"{'total':<58} {sum(tensor.numel() for tensor in state.values()):>16,} in {len(state)} tensors")


def tensor_table(state: dict[str, Tensor]) -> list[tuple[str, str, str]]:
    """Rows (name with {i} for the block, blocks, shape), equal blocks together."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for name, tensor in state.items():
        numbered = re.match(r"blocks\.(\d+)\.", name)
        general = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
        shape = "x".join(map(str, tensor.shape))
        blocks.setdefault((general, shape), []).extend([int(numbered[1])] if numbered else [])
    return [(name, ranges(indices), shape) for (name, shape), indices in blocks.items()]


def count_by_part(state: dict[str, Tensor]) -> dict[str, int]:
    """Numbers stored per part of the model; those of all blocks added up."""
    counts: Counter[str] = Counter()
    for name, tensor in state.items():
        words = name.split(".")
        part = words[0] if words[0] != "blocks" else f"blocks.{words[2]}"
        counts[part] += tensor.numel()
    return dict(counts)
