"""A trace of a few steps: what ran when, on the processor and the accelerator, for chrome://tracing or Perfetto."""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerAction, profile, supported_activities

from configs.files import atomic_path
from train.config import TrainConfig

FOLDER = "profile"  # in the run folder


def start_profiler(config: TrainConfig, rank: int, start: int, say: Callable[[str], None]) -> profile:
    """Records the steps that the `profile` section names, of a run that begins after `start` steps; its `step` is to be
    called after each. A run that begins or ends within them leaves no trace."""
    first, end = config.profile.start, config.profile.start + config.profile.steps
    traced = range(first, end) if start <= first and (rank == 0 or config.profile.every_rank) else range(0)

    def action(count: int) -> ProfilerAction:
        if (step := start + count) not in traced:
            return ProfilerAction.NONE
        return ProfilerAction.RECORD_AND_SAVE if step == traced[-1] else ProfilerAction.RECORD

    def write(recording: profile) -> None:
        path = Path(config.out) / FOLDER / f"steps_{first + 1:07d}-{end:07d}_rank_{rank:05d}.json.gz"
        with atomic_path(path) as part:
            recording.export_chrome_trace(str(part))
        say(f"step {end}: traced into {path}")

    profiler = profile(activities=supported_activities(), schedule=action, on_trace_ready=write)
    profiler.start()
    return profiler
