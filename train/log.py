"""The one writer of metrics: metrics.jsonl, which wandb and TensorBoard follow if asked for; and the progress line."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress

from tqdm import tqdm

from configs import to_dict
from configs.storage import write_text
from train.config import TrainConfig
from train.trackers import METRICS, close_trackers, start_tracker


class Log:
    """The metrics of one run; only the main process writes. A resumed run continues the file after its checkpoint."""

    def __init__(self, config: TrainConfig, start: int, main: bool) -> None:
        self.main, self.path = main, config.folder / METRICS
        name = config.objective["name"]
        self.progress = tqdm(total=config.steps, initial=start, desc=name, unit="step", disable=not main)
        if main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                write_text(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= start))
        settings = {"project": config.wandb_project, "config": to_dict(config)}
        wanted = {"wandb": config.wandb, "tensorboard": config.tensorboard}
        trackers = [name for name in wanted if wanted[name] and main]
        self.trackers = {name: start_tracker(name, self.path.parent, start, settings) for name in trackers}

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """One line of metrics.jsonl after `step` optimizer steps; videos are paths in the run folder."""
        if not self.main:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if shown := {name: f"{metrics[name]:.4f}" for name in ("loss", "data_wait") if name in metrics}:
            self.progress.set_postfix(shown, refresh=False)

    def say(self, text: str) -> None:
        """One line for a person, above the progress line."""
        if self.main:
            self.progress.write(text)

    def close(self) -> None:
        self.progress.close()
        close_trackers(self.trackers)


def _step_of(line: str) -> float:
    """Infinite for anything but a line of metrics, such as half a line of a run that was killed."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        if isinstance(step := json.loads(line)["step"], int):
            return step
    return math.inf
