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


def _doctor(words: list[str]) -> int:
    """Examine every node before a run: configs/machines/X.yaml shared=FOLDER bucket=s3://... timeout_s= megabytes="""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what is lost is said here, in one line instead of a stack
    from launch.doctor import doctor

    return doctor(words)


def _plan(words: list[str]) -> int:
    """What a run holds and computes, and whether it fits: configs/machines/X.yaml configs/train/Y.yaml memory_gib="""
    from launch.plan import plan

    return plan(words)


def _links(words: list[str]) -> int:
    """What the doctor starts on every rank: how fast ranks talk to each other, how far apart clocks are."""
    from launch.links import links

    return links(words)


def _accelerate(words: list[str]) -> None:
    """What `run` starts on a node: `accelerate launch` with a rendezvous that only the run's machines reach."""
    from launch.rendezvous import accelerate

    accelerate(words)


VERBS = {
    "run": _run, "doctor": _doctor, "plan": _plan, "links": _links, "accelerate": _accelerate, "road": road,
    "warm": warm,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(run("launch", VERBS, default="run"))
