"""The one writer of figures: metrics.jsonl, the progress line, and wandb and TensorBoard when asked."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from configs.errors import UserError
from configs.files import write_text
from configs.foreign import reading
from train.config import TrainConfig
from train.trackers import Tracker, trackers

METRICS = "metrics.jsonl"


def require_tensorboard() -> None:
    """Raises ValueError in one line if the package is not installed."""
    found = find_spec("tensorboard")
    if found is None or found.origin is None:  # none, or a folder of that name
        raise UserError("tensorboard=true needs a package that is not installed: pip install '.[tensorboard]'")


class Log:
    """Figures of one run; only the main process writes. A resumed run continues the file after its checkpoint."""

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
        self.trackers = trackers(config, start)

    def advance(self, loss: float, data_wait: float) -> None:
        self.progress.set_postfix_str(f"loss {loss:.4f}, data wait {data_wait:.1%}", refresh=False)
        self.progress.update()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, `step` being the number of optimizer steps done."""
        if not self.main:
            return
        self._append(step, figures)
        for tracker in self.trackers:
            tracker.tell(lambda writer: writer.write(step, figures))

    def show(self, step: int, videos: Mapping[str, Path]) -> None:
        """Videos by name, each with its contact sheet beside it (.png): their paths go to metrics.jsonl, they
        themselves to wandb, and their sheets to TensorBoard, which plays no mp4."""
        if not self.main or not videos:
            return
        named = {f"video/{name}": path for name, path in videos.items()}
        self._append(step, {name: str(path.relative_to(self.path.parent)) for name, path in named.items()})
        for tracker in self.trackers:
            tracker.tell(lambda writer: writer.show(step, named))

    def _append(self, step: int, entries: Mapping[str, float | str]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entries}) + "\n")

    def say(self, text: str) -> None:
        """One line for a person, above the progress line."""
        if self.main:
            self.progress.write(text)

    def close(self) -> None:
        self.progress.close()
        for tracker in self.trackers:
            tracker.close()


def _step_of(line: str) -> float:
    """Infinite for what is no line of figures, as half a line of a run that was killed."""
    try:
        with reading(METRICS):
            step = json.loads(line)["step"]
    except ValueError:
        return float("inf")
    return step if isinstance(step, int) else float("inf")
