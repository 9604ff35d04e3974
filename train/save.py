"""Writing checkpoints: every rank its part, the main process what everyone reads, COMPLETE last."""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from configs import cache, save_config, storage
from configs.errors import FileError, one_line
from configs.files import NO_ROOM
from model.weights import save_weights
from model.world import COMPLETE, STEP_FOLDERS, WORLD_FILE, WorldModelConfig, complete_steps, keep_codec
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
from train.config import CheckpointConfig, TrainConfig
from train.ema import Ema
from train.engine import Engine, gather_objects
from train.run_folder import as_asked, push
from train.state import SavedState, checksums, collect_state
from train.watchdog import own_store


class Saver:
    """Writes the checkpoints of one run, one at a time: into its folder, with `checkpoint.background` while training
    goes on; or to its s3:// url, where the upload always is in the background.

    No process group is used but for the folder: the parts of all ranks are there when their files are, since a file
    gets its name when it is whole.
    """

    def __init__(self, engine: Engine, ema: Ema, config: TrainConfig, world: WorldModelConfig) -> None:
        self.engine, self.ema, self.config, self.world = engine, ema, config, world
        self.remote = storage.is_s3(config.checkpoints)
        self.fault: BaseException | None = None  # of the newest save
        self._thread: threading.Thread | None = None
        self._store = own_store()

    @property
    def saving(self) -> bool:
        """Whether something is being written while training goes on."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, position: Position) -> str:
        """Writes, or begins to write, the checkpoint of `position`; deletes those that are superseded. All ranks must
        call. The checkpoint before it stays until it is whole.

        Raises OSError in one line when a disk does not take one. A server that does not is another matter: that is
        said on stderr, and the next checkpoint is another try.
        """
        self.finish()
        self.check()
        self.fault = None
        folder = step_folder(self.config.checkpoints, position.step)
        if self.engine.accelerator.is_main_process:  # what a save that was killed, or failed, has left
            self._try(folder, lambda: storage.remove_folder(folder, COMPLETE))
        if not all(gather_objects(self.fault is None)):
            self.check()
            return folder
        collected = self._collect()
        if self.config.checkpoint.background:
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in collected[0].items()}
            self._aside(folder, lambda: self._complete(folder, position, *self._stage(folder, tensors, collected[1])))
        elif self.remote:
            staged: list[tuple[Path, ExitStack]] = []
            self._try(folder, lambda: staged.append(self._stage(folder, *collected)))
            if staged:
                self._aside(folder, partial(self._complete, folder, position, *staged[0]))
        else:
            self._try(folder, lambda: self._complete(folder, position, *self._stage(folder, *collected)))
            self.check()
            self.engine.accelerator.wait_for_everyone()
        return folder

    def check(self) -> None:
        """Raises the error of a save, if it had one; not that of a server that takes none, which has been said."""
        if self.fault is not None and not (self.remote and isinstance(self.fault, OSError)):
            raise self.fault

    def finish(self) -> None:
        """Waits until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _aside(self, folder: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()

        def do() -> None:
            self._try(folder, work)
            if self.fault is None and self.engine.accelerator.is_main_process:
                tqdm.write(f"{folder}: written beside the training, in {time.perf_counter() - began:.1f} s")

        self._thread = threading.Thread(target=do, name="save")
        self._thread.start()

    def _try(self, folder: str, work: Callable[[], None]) -> None:
        """Does the work, and keeps the error that it may raise: in a thread, nobody else would see it."""
        try:
            work()
        except OSError as error:
            full = not self.remote or error.errno in NO_ROOM
            remedy = "make room on the disk" if full else "the server may be back later"
            self.fault = FileError(
                f"cannot write {folder}: {error.strerror or one_line(error)}; the checkpoint before it is whole: "
                f"{remedy}, and the same command goes on from there"
            )
            self.fault.__cause__ = error
            if self.remote:  # by any rank, at once: the run goes on
                tqdm.write(f"train run: rank {self.engine.accelerator.process_index}: {self.fault}", file=sys.stderr)
        except BaseException as error:  # noqa: BLE001 - raised by `check`, or by who has called `finish`
            self.fault = error
        if self.fault is not None and self._store is not None:
            with suppress(RuntimeError):  # rank 0, who waits for this rank's part, has gone
                self._store.set(_failed(folder), str(self.engine.accelerator.process_index))

    def _collect(self) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        """This rank's part; nothing where another rank has the same."""
        if not self.engine.writes_state:
            return {}, {}
        main = self.engine.accelerator.is_main_process
        buffers = dict(self.engine.buffers()) if main else {}
        return collect_state(self.engine.shards(), self.engine.adam, self.ema.averages, buffers)

    def _stage(self, folder: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Path, ExitStack]:
        """Writes this rank's part to this machine's disk: where it is then, until the stack is closed."""
        name = state_file(self.engine.accelerator.process_index)
        with ExitStack() as stack:
            place = stack.enter_context(cache.tmp_dir()) if self.remote else Path(folder) / TRAINER
            if self.engine.writes_state:
                save_weights(tensors, place / name, {**metadata, **checksums(tensors)})
            return place / name, stack.pop_all()

    def _complete(self, folder: str, position: Position, part: Path, staged: ExitStack) -> None:
        """Brings this rank's part to where it belongs; the main process adds the rest."""
        with staged:
            if self.remote and self.engine.writes_state:
                storage.write_file(part, storage.join(folder, f"{TRAINER}/{part.name}"))
            if self.engine.accelerator.is_main_process:
                self._finish(folder, position, part)

    def _finish(self, folder: str, position: Position, own: Path) -> None:
        """What the main process writes, when the parts of all ranks are there."""
        parts = [state_file(rank) for rank in range(position.ranks if self.engine.all_write_state else 1)]
        self._wait_for(parts, folder)
        where = {name: storage.join(folder, f"{TRAINER}/{name}") for name in parts} | {own.name: own}
        saved, specs = SavedState(where[name] for name in parts), weight_specs(self.world)
        for name, what in WEIGHTS.items():
            with storage.writing(storage.join(folder, f"{name}.safetensors")) as file:
                save_weights(saved.whole(what, specs), file, {"step": str(position.step)})
        for name, config in (("config.yaml", as_asked(self.config)), (WORLD_FILE, self.world)):
            with storage.writing(storage.join(folder, name)) as file:
                save_config(config, file)
        storage.write_text(storage.join(folder, f"{TRAINER}/{POSITION}"), json.dumps(asdict(position)))
        keep_codec(self.config.codec, self.config.checkpoints)
        push(Path(self.config.out), self.config.checkpoints)
        told = {"format": FORMAT, "step": position.step, "bytes": storage.list_tree(folder)}
        storage.write_text(storage.join(folder, COMPLETE), json.dumps(told, indent=1))
        remove_superseded(self.config.checkpoints, self.config.checkpoint)

    def _wait_for(self, parts: list[str], folder: str) -> None:
        # Twice: where nothing else goes on, the watchdog then has named who is gone.
        patience, place = 2 * self.config.engine.timeout_s, storage.join(folder, TRAINER)
        deadline = time.monotonic() + patience
        while missing := sorted(set(parts) - {storage.name_of(url) for url in storage.list_files(place)}):
            if self._store is not None and self._store.check([_failed(folder)]):
                raise FileError("another rank could not write its part, and has said why")
            if time.monotonic() > deadline:
                raise FileError(f"{', '.join(missing)} did not come in {patience:.0f} s")
            time.sleep(0.5 if self.remote else 0.01)


def _failed(folder: str) -> str:
    """The key of the store under which a rank says that it cannot write its part of the checkpoint `folder`."""
    return f"worldloom/failed/{folder}"


def superseded(whole: list[str], config: CheckpointConfig) -> list[str]:
    """Which of a run's complete checkpoints, oldest first, need not be kept."""
    old = whole[: -config.keep_last]
    return [name for name in old if not config.keep_every or int(name.rpartition("_")[2]) % config.keep_every]


def remove_superseded(run: str, config: CheckpointConfig) -> None:
    """Deletes the checkpoints of `run` that need not be kept, and what saves that never came to their end have left.
    Nothing but folders with the names that checkpoints get; of a link to one, the link. What stays is said."""
    whole, there = complete_steps(run), map(storage.name_of, storage.list_folders(run))
    ours = [name for name in there if fnmatch(name, STEP_FOLDERS)]
    old = superseded([name for name in whole if name in ours], config)
    for name in old + [name for name in ours if name not in whole]:
        place = storage.join(run, name)
        try:
            storage.remove_folder(place, COMPLETE)  # COMPLETE first: a kill here leaves nothing that looks whole
        except OSError as error:  # the new checkpoint is there
            tqdm.write(f"train run: cannot delete {place}: {one_line(error)}", file=sys.stderr)
