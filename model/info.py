"""`python -m model info`: the tensors of a model and how many numbers its parts hold."""

import re
from collections import Counter

import torch
from torch import Tensor

from model.action_dit import ActionDiT
from model.config import ModelConfig
from model.official import general_name, ranges


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
    rows: dict[tuple[str, str], list[int]] = {}
    for name, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        row = rows.setdefault((general_name(name), "x".join(map(str, tensor.shape))), [])
        row += [int(block[1])] if block else []
    return [(name, ranges(blocks), shape) for (name, shape), blocks in rows.items()]


def count_by_part(state: dict[str, Tensor]) -> dict[str, int]:
    """Parameters per part of the model; those of all blocks added up."""
    counts: Counter[str] = Counter()
    for name, tensor in state.items():
        part = re.match(r"blocks\.{i}\.\w+|\w+", general_name(name))
        assert part
        counts[part[0].replace("{i}.", "")] += tensor.numel()
    return counts
