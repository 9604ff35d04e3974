"""`python -m model info configs/models/X.yaml` and `python -m model parity DIR`."""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from configs import load_config
from configs.cli import run
from model.action_dit import ActionDiT
from model.config import ModelConfig
from model.fixtures import Row, read_fixtures, run_fixture
from model.parity import CASES


def info(words: list[str]) -> None:
    """Parameters per part, and the names and shapes of all tensors, of a model: FILE.yaml key=value ..."""
    config = load_config(ModelConfig, words)
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
    return [(name, _ranges(indices), shape) for (name, shape), indices in blocks.items()]


def count_by_part(state: dict[str, Tensor]) -> dict[str, int]:
    """Numbers stored per part of the model; those of all blocks added up."""
    counts: Counter[str] = Counter()
    for name, tensor in state.items():
        words = name.split(".")
        part = words[0] if words[0] != "blocks" else f"blocks.{words[2]}"
        counts[part] += tensor.numel()
    return dict(counts)


def parity(words: list[str]) -> int:
    """Compares the model with the fixtures in a folder and says how far each output is from the reference's: DIR"""
    if len(words) != 1 or not Path(words[0]).is_dir():
        raise ValueError(f"give one folder of fixtures, not {' '.join(words) or 'nothing'!r}")
    # The one import against the order of the packages: presets and live actions belong to sampling, and one command
    # judges everything.
    from sampling.parity import CASES as SAMPLING_CASES

    torch.backends.cuda.matmul.allow_tf32 = False
    rows = [row for fixture in read_fixtures(Path(words[0])) for row in run_fixture(fixture, CASES | SAMPLING_CASES)]
    judged = [row for row in rows if row.verdict != "not supported"]
    if not judged:
        raise ValueError(f"no fixture in {words[0]} is of a kind that can be judged yet")
    width = max(len(row.output) for row in judged)
    print(f"{'case':<24} {'output':<{width}} {'error':>10} {'tolerance':>10}  verdict")
    for row in judged:
        print(f"{row.case:<24} {row.output:<{width}} {row.error:>10.2e} {row.tolerance:>10.2e}  {row.verdict}")
    _summarise(rows)
    return 1 if any(row.verdict == "FAIL" for row in rows) else 0


def _summarise(rows: list[Row]) -> None:
    print()
    for case in dict.fromkeys(row.case for row in rows):
        outputs = [row.output for row in rows if row.case == case and row.verdict == "not supported"]
        if outputs:
            print(f"not supported yet: {case}: {', '.join(outputs)}")
    verdicts = Counter(row.verdict for row in rows)
    print("; ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))


def _ranges(indices: Iterable[int]) -> str:
    """0-14,20 for sorted block numbers."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


VERBS = {"info": info, "parity": parity}

if __name__ == "__main__":
    sys.exit(run("model", VERBS))
