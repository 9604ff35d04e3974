"""What a run measures of itself: losses by noise level and place, speed, and which rank is slow."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from model.config import ActionDiTConfig
from model.cost import training_flops
from model.loss import SIGMA_BINS
from model.memory import memory_gib
from train.objectives.base import Figures

flops_of_pass = lru_cache(training_flops)  # counted once per shape: it builds the model, on the meta device


@dataclass(frozen=True)
class Scale:
    """What the figures of a run's steps are put in relation to."""

    model: ActionDiTConfig
    ranks: int
    clips_per_step: int  # on all ranks
    latents: int  # of a clip
    block: int  # latents that share a noise level, and so a figure
    peak_tflops: float | None  # of one device, dense

    def work(self, sequence: torch.Size) -> tuple[float, float]:
        """Video tokens of one pass over latents of the shape (b c f h w), and its FLOPs if they are asked for."""
        b, _, f, h, w = sequence
        _, p, q = self.model.patch_size
        flops = flops_of_pass(self.model, b, f, h, w) if self.peak_tflops else 0
        return float(b * f * (h // p) * (w // q)), float(flops)


class StepFigures:
    """What this rank's micro-steps of one step said, as sums that can be added over ranks."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.sums = torch.zeros(2, SIGMA_BINS + scale.latents)  # losses and samples, by noise level and by place
        self.work = torch.zeros(3)  # tokens, FLOPs, clips that could not be read

    def add(self, figures: Figures, skipped_clips: int = 0) -> None:
        loss = figures.loss.cpu().float()
        samples = torch.full_like(loss, 1 / loss.shape[1])  # all count alike, however many latents they have
        levels = (figures.sigma.cpu() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
        places = SIGMA_BINS + figures.first + torch.arange(loss.shape[1]).expand_as(levels)
        for index in (levels, places):
            self.sums[0].index_add_(0, index.flatten(), (loss * samples).flatten())
            self.sums[1].index_add_(0, index.flatten(), samples.flatten())
        self.work += torch.tensor([*self.scale.work(figures.sequence), float(skipped_clips)])


def describe(sums: Tensor, block: int) -> dict[str, float]:
    """`loss`, `loss/sigma_a-b` and `loss/latent_i` (`loss/block_i` if blocks have more than one latent) from sums as of
    StepFigures; what no sample stands for is left out."""
    levels, places = sums.split([SIGMA_BINS, sums.shape[1] - SIGMA_BINS], dim=1)
    kind = "latent" if block == 1 else "block"
    named = {"loss": levels.sum(dim=1)}
    named |= {f"loss/sigma_{i / SIGMA_BINS:.2f}-{(i + 1) / SIGMA_BINS:.2f}": levels[:, i] for i in range(SIGMA_BINS)}
    named |= {f"loss/{kind}_{i}": part.sum(dim=1) for i, part in enumerate(places.split(block, dim=1))}
    return {name: (losses / samples).item() for name, (losses, samples) in named.items() if samples > 0}


PER_RANK = ("forward_s", "waited_s", "memory_gib")  # what every rank tells the others of a step


def per_rank(rank: int, ranks: int, forward_s: float, waited_s: float) -> Tensor:
    """(PER_RANK ranks) with this rank's column filled in, to be added up over all."""
    own = torch.zeros(len(PER_RANK), ranks)
    own[:, rank] = torch.tensor([forward_s, waited_s, memory_gib()])
    return own


class Interval:
    """What happened since the last line of metrics.jsonl."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.restart()

    def restart(self) -> None:
        self.sums, self.work = torch.zeros(2, SIGMA_BINS + self.scale.latents), torch.zeros(3)
        self.steps, self.waited_s, self.skipped = 0, 0.0, 0
        self.ranks_s, self.memory = torch.zeros(2, self.scale.ranks), 0.0  # forward and waiting
        self.began = time.perf_counter()

    def add(self, sums: Tensor, work: Tensor, by_rank: Tensor) -> None:
        """One step's sums and work as of StepFigures, and what `per_rank` gave, added up over all ranks."""
        self.sums, self.work, self.steps = self.sums + sums, self.work + work, self.steps + 1
        self.ranks_s, self.memory = self.ranks_s + by_rank[:2], max(self.memory, by_rank[2].max().item())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block as waiting for data."""
        before = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the block at all: validation, videos and checkpoints have lines of their own."""
        before = time.perf_counter()
        yield
        self.began += time.perf_counter() - before

    @property
    def data_wait(self) -> float:
        """The share of the time that was spent waiting for data, in [0, 1]."""
        return self.waited_s / (time.perf_counter() - self.began)

    def figures(self) -> dict[str, float]:
        """Losses and speed. Forward passes tell which rank is slow: in backward ones all wait for each other."""
        took_s, scale = time.perf_counter() - self.began, self.scale
        forward_s, waited_s = self.ranks_s
        tokens, flops, skipped_clips = self.work.tolist()
        ranks = {
            "forward_s/slowest_rank": (forward_s.max() / self.steps).item(),
            "forward_s/fastest_rank": (forward_s.min() / self.steps).item(),
            "data_wait/worst_rank": (waited_s.max() / took_s).item(),
            "memory_gib": self.memory,
        }
        speed = {
            "s/step": took_s / self.steps,
            "clips/s": self.steps * scale.clips_per_step / took_s,
            "tokens/s": tokens / took_s,
        }
        if scale.peak_tflops:
            speed["mfu"] = flops / (took_s * scale.ranks * scale.peak_tflops * 1e12)
        counted = {"data_wait": self.data_wait, "skipped_steps": self.skipped, "skipped_clips": int(skipped_clips)}
        return {**describe(self.sums, scale.block), **speed, **ranks, **counted}
