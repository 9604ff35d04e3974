"""`python -m launch configs/machines/X.yaml configs/train/Y.yaml ...` starts a run; `road` the whole road."""

import os
import sys

from configs.cli import run
from launch.road import road


def _run(words: list[str]) -> int:
    """Start a run, or write it down for a scheduler: configs/machines/X.yaml configs/train/Y.yaml ... dry_run=true"""
    from launch.local import launch

    return launch(words)


def warm(words: list[str]) -> None:
    """Compile what DeepSpeed compiles at its first start on a CPU, so that no run waits for it."""
    import torch

    if torch.cuda.is_available():
        return  # no such step on an accelerator
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator is not None
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    assert builder is not None
    builder.load(verbose=False)


VERBS = {"run": _run, "road": road, "warm": warm}

if __name__ == "__main__":
    sys.exit(run("launch", VERBS, default="run"))
