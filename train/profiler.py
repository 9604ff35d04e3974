"""A trace of a few steps: what ran when, on the processor and the accelerator, for chrome://tracing or Perfetto."""

from pathlib import Path

from torch.profiler import ProfilerAction, profile, supported_activities

from configs.files import atomic_path
from train.config import TrainConfig

FOLDER = "profile"  # in the run folder


class Profiler:
    """Records the steps that the `profile` section names. A run that ends within them leaves no trace."""

    def __init__(self, config: TrainConfig, rank: int) -> None:
        self.config, self.rank, self.out = config.profile, rank, Path(config.out)
        self._recording: profile | None = None

    def begins(self, step: int) -> None:
        """Before step `step`, counted from 0."""
        wanted = self.config.steps and (self.rank == 0 or self.config.every_rank)
        if wanted and step == self.config.start:
            # With a schedule the steps are marked in the trace.
            self._recording = profile(activities=supported_activities(), schedule=lambda _: ProfilerAction.RECORD)
            self._recording.start()

    def ends(self, step: int) -> Path | None:
        """After step `step`; the file, if it was the last to be recorded."""
        if self._recording is None:
            return None
        if step + 1 < self.config.start + self.config.steps:
            self._recording.step()
            return None
        self._recording.stop()
        path = self.out / FOLDER / f"steps_{self.config.start + 1:07d}-{step + 1:07d}_rank_{self.rank:05d}.json.gz"
        with atomic_path(path) as part:
            self._recording.export_chrome_trace(str(part))
        self._recording = None
        return path
