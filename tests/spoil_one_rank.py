"""The training program with a loss that is NaN on rank 1 in step 3, or SPOIL=memory: too large for this machine."""

import os
import sys

import torch

from configs.cli import run
from train import loop
from train.objectives.autoregressive import Autoregressive

whole_loss = Autoregressive.loss


def loss(self, model, flow, batch, progress, draws):
    value, figures = whole_loss(self, model, flow, batch, progress, draws)
    if round(progress * 8) != 3:
        return value, figures
    if os.environ.get("SPOIL") == "memory":
        value = value + torch.empty(1 << 55).sum()
    return (value * float("nan") if os.environ["RANK"] == "1" else value), figures


if __name__ == "__main__":
    Autoregressive.loss = loss  # type: ignore[method-assign]
    sys.exit(run("train", {"run": lambda words: loop.train(words)}, ["run", *sys.argv[1:]]))
