"""The one writer of figures: metrics.jsonl, the progress line, and wandb and TensorBoard when asked."""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs.cli import one_line
from configs.files import write_text
from train.config import TrainConfig

METRICS, WANDB_ID = "metrics.jsonl", "wandb_id"
TENSORBOARD = "tensorboard"  # folder in the run folder


def require_tensorboard() -> None:
    """Raises ValueError in one line if the package is not installed."""
    found = find_spec("tensorboard")
    if found is None or found.origin is None:  # none, or a folder of that name
        raise ValueError("tensorboard=true needs a package that is not installed: pip install '.[tensorboard]'")


class Log:
    """Figures of one run; only the main process writes. A resumed run continues the file after its checkpoint."""

    def __init__(self, config: TrainConfig, start: int, main: bool) -> None:
        self.main, self.path = main, Path(config.out) / METRICS
        self.progress = tqdm(
            total=config.steps, initial=start, desc=config.objective["name"], unit="step", disable=not main
        )
        self.wandb: Any = None
        self.board: Any = None
        if not main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= start]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        if config.wandb:
            import wandb  # costs a second, and asks for an account unless WANDB_MODE=offline
            from wandb.errors import Error as WandbError

            place = self.path.with_name(WANDB_ID)  # a run that goes on after a preemption is the same one there
            if not place.exists():
                write_text(place, secrets.token_hex(8))
            try:
                self.wandb = wandb.init(
                    project=config.wandb_project,
                    name=Path(config.out).name,
                    id=place.read_text(),
                    resume="allow",
                    dir=config.out,
                    config=asdict(config),
                    mode=os.environ.get("WANDB_MODE", "online"),  # type: ignore[arg-type]
                )
            except WandbError as error:
                raise ValueError(f"wandb=true: {one_line(error)}; or set WANDB_MODE=offline") from error
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # not there without its package

            self.board = SummaryWriter(self.path.with_name(TENSORBOARD), purge_step=start + 1)

    def advance(self, loss: float, data_wait: float) -> None:
        self.progress.set_postfix_str(f"loss {loss:.4f}, data wait {data_wait:.1%}", refresh=False)
        self.progress.update()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, `step` being the number of optimizer steps done."""
        if not self.main:
            return
        self._append(step, figures)
        if self.wandb is not None:
            self.wandb.log(dict(figures), step=step)
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # so that a run that is killed has said as much here as in metrics.jsonl

    def show(self, step: int, videos: Mapping[str, Path]) -> None:
        """Videos by name, each with its contact sheet beside it (.png): their paths go to metrics.jsonl, they
        themselves to wandb, and their sheets to TensorBoard, which plays no mp4."""
        if not self.main or not videos:
            return
        named = {f"video/{name}": path for name, path in videos.items()}
        self._append(step, {name: str(path.relative_to(self.path.parent)) for name, path in named.items()})
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Video(path) for name, path in named.items()}, step=step)
        if self.board is not None:
            for name, path in named.items():
                with Image.open(path.with_suffix(".png")) as sheet:
                    self.board.add_image(name, np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
            self.board.flush()

    def _append(self, step: int, entries: Mapping[str, float | str]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entries}) + "\n")

    def say(self, text: str) -> None:
        """One line for a person, above the progress line."""
        if self.main:
            self.progress.write(text)

    def close(self) -> None:
        self.progress.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")  # half a line of a run that was killed
