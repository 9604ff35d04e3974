"""The training program with a loss that is NaN on rank SPOIL_RANK in step 3, in micro-step SPOIL_MICRO alone if it is
given; or with SPOIL=memory: too large for this machine."""

import os
import sys
from collections import Counter

import torch

from configs.cli import Verb, run
from train import loop
from train.objectives.autoregressive import Autoregressive

whole_loss = Autoregressive.loss
micro_steps = Counter()


def loss(self, model, flow, batch, progress, rng):
    value, metrics = whole_loss(self, model, flow, batch, progress, rng)
    micro_steps[progress] += 1
    now = str(micro_steps[progress])
    if round(progress * 8) != 3 or os.environ.get("SPOIL_MICRO", now) != now:
        return value, metrics
    if os.environ.get("SPOIL") == "memory":
        value = value + torch.empty(1 << 55).sum()
    nonfinite = os.environ.get("RANK", "0") == os.environ.get("SPOIL_RANK", "1")
    return (value * float("nan") if nonfinite else value), metrics


if __name__ == "__main__":
    Autoregressive.loss = loss  # type: ignore[method-assign]
    sys.exit(run("train", {"run": Verb(loop.train)}, ["run", *sys.argv[1:]]))
