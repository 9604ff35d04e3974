"""Writing checkpoints: every rank its part, the main process what everyone reads, COMPLETE last."""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from configs import save_config
from configs.files import write_text
from model.weights import save_weights
from sampling.world_model import COMPLETE, WORLD_FILE, WorldModelConfig, complete_checkpoints
from train.checkpoint import (
    FORMAT,
    POSITION,
    TRAINER,
    WEIGHTS,
    Position,
    state_file,
    step_folder,
    weight_specs,
)
from train.config import TrainConfig
from train.ema import Ema
from train.engine import Engine
from train.state import SavedState, collect_state


class Saver:
    """Writes the checkpoints of one run, one at a time; with `checkpoint.background` while training goes on.

    No process group is used but for the folder: the parts of all ranks are there when their files are, since a file
    gets its name when it is whole.
    """

    def __init__(self, engine: Engine, ema: Ema, config: TrainConfig, world: WorldModelConfig) -> None:
        self.engine, self.ema, self.config, self.world = engine, ema, config, world
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def save(self, position: Position) -> Path:
        """Writes, or begins to write, the checkpoint of `position`; deletes those that are superseded. All ranks must
        call. Raises OSError in one line when a disk does not take one; the checkpoint before it stays."""
        self.wait()
        folder = step_folder(Path(self.config.out), position.step)
        if self.engine.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
            (folder / TRAINER).mkdir(parents=True)
        self.engine.accelerator.wait_for_everyone()
        tensors, metadata = self._collect()
        if self.config.checkpoint.background:
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            given = (folder, position, tensors, metadata)
            self._thread = threading.Thread(target=self._write_aside, args=given, name="save")
            self._thread.start()
        else:
            self._write(folder, position, tensors, metadata)
            self.engine.accelerator.wait_for_everyone()
        return folder

    def check(self) -> None:
        """Raises the OSError of a save in the background, if it had one."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until nothing is being written any more; raises as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _collect(self) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        """This rank's part; nothing where another rank has the same."""
        if not self.engine.writes_state:
            return {}, {}
        main = self.engine.accelerator.is_main_process
        buffers = dict(self.engine.buffers()) if main else {}
        return collect_state(self.engine.fragments(), self.engine.adam, self.ema.averages, buffers)

    def _write_aside(
        self, folder: Path, position: Position, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        try:
            self._write(folder, position, tensors, metadata)
        except OSError as error:
            self._error = error

    def _write(
        self, folder: Path, position: Position, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        accelerator = self.engine.accelerator
        try:
            if self.engine.writes_state:
                save_weights(tensors, folder / TRAINER / state_file(accelerator.process_index), metadata)
            if accelerator.is_main_process:
                self._finish(folder, position)
        except OSError as error:
            raise OSError(
                f"cannot write {folder}: {error.strerror or error}; the checkpoint before it is whole: make room on "
                "the disk and run the same command again"
            ) from error

    def _finish(self, folder: Path, position: Position) -> None:
        """What the main process writes, when the parts of all ranks are there."""
        ranks = range(position.ranks) if self.engine.all_write_state else range(1)
        parts = [folder / TRAINER / state_file(rank) for rank in ranks]
        deadline = time.monotonic() + self.config.engine.timeout_s
        while missing := [path.name for path in parts if not path.exists()]:
            if time.monotonic() > deadline:
                raise OSError(f"{', '.join(missing)} did not come in {self.config.engine.timeout_s:.0f} s")
            time.sleep(0.01)
        saved, specs = SavedState(parts), weight_specs(self.world)
        for name, what in WEIGHTS.items():
            save_weights(saved.whole(what, specs), folder / f"{name}.safetensors", {"step": str(position.step)})
        save_config(self.config, folder / "config.yaml")
        save_config(self.world, folder / WORLD_FILE)
        write_text(folder / TRAINER / POSITION, json.dumps(asdict(position)))
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_text(folder / COMPLETE, json.dumps({"format": FORMAT, "step": position.step, "bytes": files}, indent=1))
        for old in superseded(complete_checkpoints(Path(self.config.out)), self.config):
            (old / COMPLETE).unlink()  # first, so that a kill here leaves no half of a checkpoint that looks whole
            shutil.rmtree(old)


def superseded(found: list[Path], config: TrainConfig) -> list[Path]:
    """Which of a run's checkpoints, oldest first, need not be kept."""
    every = config.checkpoint.keep_every
    old = found[: -config.checkpoint.keep_last]
    return [folder for folder in old if not every or int(folder.name.rpartition("_")[2]) % every]
