"""What a run measures of itself: losses by noise level and place in the sequence, speed, which rank is slow; traces."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.profiler import ProfilerAction, profile, supported_activities

from configs import storage
from model.cost import training_flops
from model.loss import SIGMA_BINS
from train.config import TrainConfig
from train.engine import Engine
from train.memory import memory_gib
from train.objectives.objective import LossMetrics

flops_of_pass = lru_cache(training_flops)  # which builds the model, on the meta device


class MetricsWindow:
    """The steps since the last line of metrics.jsonl, as this rank saw them; added up over all ranks for that line."""

    def __init__(self, config: TrainConfig, clip_latents: int, loss_group: int) -> None:
        """`loss_group` latents of a clip's `clip_latents` share a noise level, and so a metric."""
        self.config, self.clip_latents, self.loss_group = config, clip_latents, loss_group
        self._restart()

    def _restart(self) -> None:
        self.losses: list[LossMetrics] = []  # still on their device
        self.seconds = {"step": 0.0, "waiting": 0.0, "forward": 0.0}
        self.steps = self.skipped_steps = self.skipped_clips = self.tokens = self.flops = 0

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Adds up the time that the block takes: of a `step`, of `waiting` for data, of a `forward` pass."""
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    def end_step(self, parts: list[LossMetrics], applied: bool) -> None:
        """A step of the micro-steps `parts`. If it was dropped, it counts with its time, but not with its losses."""
        self.steps += 1
        self.skipped_steps += not applied
        self.losses += parts if applied else []
        _, rows, columns = self.config.model.patch_size
        for b, _, f, h, w in (part.sequence for part in parts):
            self.tokens += b * f * (h // rows) * (w // columns)
            if self.config.peak_tflops:
                self.flops += flops_of_pass(self.config.model, b, f, h, w)

    def reduce(self, engine: Engine) -> dict[str, float]:
        """The metrics of the window over all ranks; then it starts again. All ranks must call."""
        rank, ranks = engine.accelerator.process_index, engine.accelerator.num_processes
        steps, took_s, waited_s = self.steps, self.seconds["step"], self.seconds["waiting"]
        # A forward pass tells which rank is slow: in the backward pass all wait for each other.
        measured = (self.seconds["forward"], waited_s, memory_gib(), self.tokens, self.flops, self.skipped_clips)
        by_rank = torch.zeros(len(measured), ranks, dtype=torch.float64)
        by_rank[:, rank] = torch.tensor(measured, dtype=torch.float64)
        forward, waiting, memory, tokens, flops, skipped_clips = engine.sum_over_ranks(by_rank)
        losses = engine.sum_over_ranks(loss_sums(self.losses, self.clip_latents))
        metrics = loss_metrics(losses, self.loss_group) | {
            "s/step": took_s / steps,
            "clips/s": steps * ranks * self.config.batch * self.config.accumulation / took_s,
            "tokens/s": tokens.sum().item() / took_s,
            "forward_s/slowest_rank": forward.max().item() / steps,
            "forward_s/fastest_rank": forward.min().item() / steps,
            "data_wait": waited_s / took_s,
            "data_wait/worst_rank": waiting.max().item() / took_s,
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


def start_profiler(config: TrainConfig, rank: int, start: int, say: Callable[[str], None]) -> profile:
    """A profiler that traces the steps of the `profile` section in a run that begins after `start` steps; its `step` is
    called after each. A run that begins or ends within them leaves no trace."""
    first, end = config.profile.start, config.profile.start + config.profile.steps
    traced = range(first, end) if start <= first and (rank == 0 or config.profile.every_rank) else range(0)

    def action(count: int) -> ProfilerAction:
        if (step := start + count) not in traced:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD_AND_SAVE if step == traced[-1] else ProfilerAction.RECORD

    def write(recording: profile) -> None:
        path = config.folder / "profile" / f"steps_{first + 1:07d}-{end:07d}_rank_{rank:05d}.json.gz"
        with storage.writing(path) as part:
            recording.export_chrome_trace(str(part))
        say(f"step {end}: traced into {path}")

    profiler = profile(activities=supported_activities(), schedule=action, on_trace_ready=write)
    profiler.start()
    return profiler
