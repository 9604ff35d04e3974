"""The one writer of figures: metrics.jsonl, the progress line, and wandb when asked."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from configs.files import write_text
from sampling.scores import SIGMA_BINS
from train.config import TrainConfig
from train.objectives.base import Figures

METRICS = "metrics.jsonl"


class StepFigures:
    """What a step's micro-steps said, as sums that can be added over ranks."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, SIGMA_BINS)  # losses, samples

    def add(self, figures: Figures) -> None:
        index = (figures.sigma.cpu() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
        self.sums[0].index_add_(0, index, figures.loss.cpu().float())
        self.sums[1].index_add_(0, index, torch.ones(len(index)))


def describe(sums: Tensor) -> dict[str, float]:
    """`loss` and `loss/sigma_a-b` from sums (2, bins); what no sample stands for is left out."""
    figures = {"loss": (sums[0].sum() / sums[1].sum()).item()} if sums[1].sum() > 0 else {}
    for i in range(SIGMA_BINS):
        if sums[1, i] > 0:
            low, high = i / SIGMA_BINS, (i + 1) / SIGMA_BINS
            figures[f"loss/sigma_{low:.2f}-{high:.2f}"] = (sums[0, i] / sums[1, i]).item()
    return figures


PER_RANK = ("forward_s", "waited_s", "memory_gib")  # what every rank tells the others of a step


def per_rank(rank: int, ranks: int, forward_s: float, waited_s: float) -> Tensor:
    """(PER_RANK ranks) with this rank's column filled in, to be added up over all."""
    own = torch.zeros(len(PER_RANK), ranks)
    own[:, rank] = torch.tensor([forward_s, waited_s, memory_gib()])
    return own


def memory_gib() -> float:
    """CUDA: most that torch has held; else what the process holds."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class Interval:
    """What happened since the last line of metrics.jsonl."""

    def __init__(self, clips_per_step: int, ranks: int) -> None:
        self.clips_per_step, self.ranks = clips_per_step, ranks
        self.restart()

    def restart(self) -> None:
        self.sums, self.steps, self.waited_s, self.skipped = torch.zeros(2, SIGMA_BINS), 0, 0.0, 0
        self.ranks_s, self.memory = torch.zeros(2, self.ranks), 0.0  # forward and waiting
        self.began = time.perf_counter()

    def add(self, sums: Tensor, by_rank: Tensor) -> None:
        """One step's sums (2, bins) over all ranks, and what `per_rank` gave, added up."""
        self.sums, self.steps = self.sums + sums, self.steps + 1
        self.ranks_s, self.memory = self.ranks_s + by_rank[:2], max(self.memory, by_rank[2].max().item())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting for data."""
        before = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the block at all: validation and checkpoints have lines of their own."""
        before = time.perf_counter()
        yield
        self.began += time.perf_counter() - before

    @property
    def data_wait(self) -> float:
        """The share of the time that was spent waiting for data, in [0, 1]."""
        return self.waited_s / (time.perf_counter() - self.began)

    def figures(self) -> dict[str, float]:
        """Losses and speed. Forward passes tell which rank is slow: in backward ones all wait for each other."""
        took_s = time.perf_counter() - self.began
        forward_s, waited_s = self.ranks_s
        ranks = {
            "forward_s/slowest_rank": (forward_s.max() / self.steps).item(),
            "forward_s/fastest_rank": (forward_s.min() / self.steps).item(),
            "data_wait/worst_rank": (waited_s.max() / took_s).item(),
            "memory_gib": self.memory,
        }
        speed = {"s/step": took_s / self.steps, "clips/s": self.steps * self.clips_per_step / took_s}
        return {**describe(self.sums), **speed, **ranks, "data_wait": self.data_wait, "skipped_steps": self.skipped}


class Log:
    """Figures of one run; only the main process writes. A resumed run continues the file after its checkpoint."""

    def __init__(self, config: TrainConfig, start: int, main: bool) -> None:
        self.main, self.path = main, Path(config.out) / METRICS
        self.progress = tqdm(
            total=config.steps, initial=start, desc=config.objective["name"], unit="step", disable=not main
        )
        self.wandb: Any = None
        if not main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= start]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        if config.wandb:
            import wandb  # costs a second, and asks for an account unless WANDB_MODE=offline

            self.wandb = wandb.init(
                project=config.wandb_project,
                name=Path(config.out).name,
                dir=config.out,
                config=asdict(config),
                mode=os.environ.get("WANDB_MODE", "online"),  # type: ignore[arg-type]
            )

    def advance(self, loss: float, data_wait: float) -> None:
        self.progress.set_postfix_str(f"loss {loss:.4f}, data wait {data_wait:.1%}", refresh=False)
        self.progress.update()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One line of metrics.jsonl, `step` being the number of optimizer steps done."""
        if not self.main:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.wandb is not None:
            self.wandb.log(figures, step=step)

    def say(self, text: str) -> None:
        """One line for a person, above the progress line."""
        if self.main:
            self.progress.write(text)

    def close(self) -> None:
        self.progress.close()
        if self.wandb is not None:
            self.wandb.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")  # half a line of a run that was killed
