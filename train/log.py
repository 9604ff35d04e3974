"""The one writer of metrics: metrics.jsonl, which wandb and TensorBoard follow if asked for; and the progress line."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from configs import to_dict
from configs.errors import UserError
from configs.files import write_text
from train.config import TrainConfig
from train.trackers import METRICS, Tracker, close


def require_tensorboard() -> None:
    """A UserError if the package is not installed."""
    spec = find_spec("tensorboard")
    if spec is None or spec.origin is None:  # none, or a folder of that name
        raise UserError("tensorboard=true needs a package that is not installed: pip install '.[tensorboard]'")


class Log:
    """The metrics of one run; only the main process writes. A resumed run continues the file after its checkpoint."""

    def __init__(self, config: TrainConfig, start: int, main: bool) -> None:
        self.main, self.path = main, Path(config.out) / METRICS
        self.progress = tqdm(
            total=config.steps, initial=start, desc=config.objective["name"], unit="step", disable=not main
        )
        self.trackers: list[Tracker] = []
        if not main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= start))
        if config.wandb:
            settings = {"project": config.wandb_project, "config": to_dict(config)}
            self.trackers.append(Tracker("wandb", self.path.parent, start, settings))
        if config.tensorboard:
            self.trackers.append(Tracker("tensorboard", self.path.parent, start, {}))

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """One line of metrics.jsonl after `step` optimizer steps; videos are paths in the run folder."""
        if not self.main:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if shown := {name: f"{metrics[name]:.4f}" for name in ("loss", "data_wait") if name in metrics}:
            self.progress.set_postfix(shown, refresh=False)

    def advance(self) -> None:
        """One more step on the progress line."""
        self.progress.update()

    def say(self, text: str) -> None:
        """One line for a person, above the progress line."""
        if self.main:
            self.progress.write(text)

    def close(self) -> None:
        self.progress.close()
        close(self.trackers)


def _step_of(line: str) -> float:
    """Infinite for anything but a line of metrics, such as half a line of a run that was killed."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        if isinstance(step := json.loads(line)["step"], int):
            return step
    return math.inf
