"""What a run measures of itself: losses by noise level and place in the sequence, speed, and which rank is slow."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from model.action_dit import ActionDiTConfig
from model.cost import training_flops
from model.loss import SIGMA_BINS
from train.config import TrainConfig
from train.engine import Engine
from train.memory import memory_gib
from train.objectives.objective import LossMetrics


@lru_cache  # it builds the model, on the meta device
def flops_of_pass(model: ActionDiTConfig, latents: torch.Size) -> int:
    """FLOPs of training on latents of the shape (b c f h w)."""
    b, _, f, h, w = latents
    return training_flops(model, b, f, h, w)


def tokens_of_pass(model: ActionDiTConfig, latents: torch.Size) -> int:
    """Video tokens of one pass over latents of the shape (b c f h w)."""
    b, _, f, h, w = latents
    _, p, q = model.patch_size
    return b * f * (h // p) * (w // q)


class MetricsWindow:
    """The steps since the last line of metrics.jsonl, as this rank saw them; added up over all ranks for that line."""

    def __init__(self, config: TrainConfig, clip_latents: int, loss_group: int) -> None:
        """`loss_group` latents of a clip's `clip_latents` share a noise level, and so a metric."""
        self.config, self.clip_latents, self.loss_group = config, clip_latents, loss_group
        self._restart()

    def _restart(self) -> None:
        self.losses: list[LossMetrics] = []  # of micro-steps, still on their device
        self.step_losses: list[LossMetrics] = []
        self.steps = self.skipped_steps = self.skipped_clips = self.tokens = self.flops = 0
        self.took_s = self.waited_s = self.forward_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Counts one optimizer step; validation, videos and checkpoints are outside of it."""
        began = time.perf_counter()
        yield
        self.took_s += time.perf_counter() - began
        self.steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts time spent waiting for data."""
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began

    def add(self, part: LossMetrics, skipped_clips: int, forward_s: float) -> None:
        """One micro-step. A forward pass tells which rank is slow: in the backward pass all wait for each other."""
        self.step_losses.append(part)
        self.skipped_clips += skipped_clips
        self.forward_s += forward_s
        self.tokens += tokens_of_pass(self.config.model, part.sequence)
        if self.config.peak_tflops:
            self.flops += flops_of_pass(self.config.model, part.sequence)

    def end_step(self, applied: bool) -> None:
        """A step that was skipped counts with its time, but not with its losses."""
        if applied:
            self.losses += self.step_losses
        else:
            self.skipped_steps += 1
        self.step_losses = []

    def reduce(self, engine: Engine) -> dict[str, float]:
        """The metrics of the window over all ranks; then it starts again. All ranks must call."""
        rank, ranks = engine.accelerator.process_index, engine.accelerator.num_processes
        measured = (self.forward_s, self.waited_s, memory_gib(), self.tokens, self.flops, self.skipped_clips)
        by_rank = torch.zeros(len(measured), ranks, dtype=torch.float64)
        by_rank[:, rank] = torch.tensor(measured, dtype=torch.float64)
        forward_s, waited_s, memory, tokens, flops, skipped_clips = engine.sum_over_ranks(by_rank)
        losses = engine.sum_over_ranks(loss_sums(self.losses, self.clip_latents))
        steps, took_s = self.steps, self.took_s
        metrics = loss_metrics(losses, self.loss_group) | {
            "s/step": took_s / steps,
            "clips/s": steps * ranks * self.config.batch * self.config.accumulation / took_s,
            "tokens/s": tokens.sum().item() / took_s,
            "forward_s/slowest_rank": forward_s.max().item() / steps,
            "forward_s/fastest_rank": forward_s.min().item() / steps,
            "data_wait": self.waited_s / took_s,
            "data_wait/worst_rank": waited_s.max().item() / took_s,
            "memory_gib": memory.max().item(),
            "skipped_steps": self.skipped_steps,
            "skipped_clips": int(skipped_clips.sum()),
        }
        if self.config.peak_tflops:
            metrics["mfu"] = flops.sum().item() / (took_s * ranks * self.config.peak_tflops * 1e12)
        self._restart()
        return metrics


def loss_sums(parts: list[LossMetrics], clip_latents: int) -> Tensor:
    """Sums (2 SIGMA_BINS+clip_latents) of losses and of samples, by noise level and by place in the sequence."""
    sums = torch.zeros(2, SIGMA_BINS + clip_latents)
    for part in parts:
        loss = part.loss.cpu().float()
        samples = torch.full_like(loss, 1 / loss.shape[1])  # a clip counts once, however many latents it has
        levels = (part.sigma.cpu() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
        places = SIGMA_BINS + part.first + torch.arange(loss.shape[1]).expand_as(levels)
        for index in (levels, places):
            sums[0].index_add_(0, index.flatten(), (loss * samples).flatten())
            sums[1].index_add_(0, index.flatten(), samples.flatten())
    return sums


def loss_metrics(sums: Tensor, loss_group: int) -> dict[str, float]:
    """`loss`, `loss/sigma_a-b` and `loss/latent_i`, or `loss/block_i` if `loss_group` is more than one latent, from
    `loss_sums`; what no sample stands for is left out."""
    levels, places = sums.split([SIGMA_BINS, sums.shape[1] - SIGMA_BINS], dim=1)
    kind = "latent" if loss_group == 1 else "block"
    named = {"loss": levels.sum(dim=1)}
    named |= {f"loss/sigma_{i / SIGMA_BINS:.2f}-{(i + 1) / SIGMA_BINS:.2f}": levels[:, i] for i in range(SIGMA_BINS)}
    named |= {f"loss/{kind}_{i}": part.sum(dim=1) for i, part in enumerate(places.split(loss_group, dim=1))}
    return {name: (losses / samples).item() for name, (losses, samples) in named.items() if samples > 0}
