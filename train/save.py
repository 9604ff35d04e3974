"""Writing checkpoints: every rank its part, rank 0 what everyone reads, COMPLETE last."""

import fnmatch
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from configs import cache, s3, save_config, storage
from configs.errors import FileError, one_line
from configs.files import NO_ROOM
from model.weights import save_weights
from model.world import COMPLETE, STEP_FOLDERS, WORLD_FILE, WorldModelConfig, complete_steps, keep_codec, write_complete
from train.checkpoint import FORMAT, POSITION, TRAINER, WEIGHTS, Position, absolute, weight_specs
from train.config import CheckpointConfig, TrainConfig
from train.ema import Ema
from train.engine import Engine, gather_objects
from train.run_folder import push
from train.state import SavedState, checksums, collect_state
from train.watchdog import own_store

STATE_FILE = "rank_{:05d}.safetensors"  # of a rank, in TRAINER


class Saver:
    """Writes the checkpoints of one run, one at a time; with `checkpoint.background` or to an s3:// url while training
    goes on, from a copy of this rank's part in the CPU's memory.

    No process group is used: the parts of all ranks are there when their files are, since a file appears whole.
    """

    def __init__(self, engine: Engine, ema: Ema, config: TrainConfig, world: WorldModelConfig) -> None:
        self.engine, self.ema, self.config, self.world = engine, ema, config, world
        self.remote = storage.is_s3(config.out)
        self.background = config.checkpoint.background or self.remote
        self.fault: BaseException | None = None  # of the newest save
        self._thread: threading.Thread | None = None
        self._store = own_store()

    def save(self, position: Position) -> str:
        """Writes, or begins to write, the checkpoint of `position`; then deletes those that it supersedes. All ranks
        must call.

        Raises FileError when a disk does not take it. A server that does not is reported on stderr: the next checkpoint
        is another try.
        """
        self.finish()
        self.check()
        self.fault = None
        folder, engine = storage.join(self.config.out, f"step_{position.step:07d}"), self.engine
        if engine.accelerator.is_main_process:  # what a save that was killed, or failed, has left
            self._try(folder, lambda: storage.remove_folder(folder, COMPLETE))
        if all(gather_objects(self.fault is None)):
            tensors, metadata = dict[str, Tensor](), dict[str, str]()
            if engine.writes_state:  # else another rank has the same
                buffers = dict(engine.buffers()) if engine.accelerator.is_main_process else {}
                tensors, metadata = collect_state(engine.shards(), engine.optimizer, self.ema.averages, buffers)
            if self.background:
                tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            work = partial(self._write, folder, position, tensors, metadata)
            self._thread = threading.Thread(target=self._try, args=(folder, work), name="save")
            self._thread.start()
            if not self.background:
                self.finish()
                self.check()
                engine.accelerator.wait_for_everyone()
        self.check()
        return folder

    def check(self) -> None:
        """Raises the error of a save, if it had one; not that of a server, which has been reported."""
        if self.fault is not None and not (self.remote and isinstance(self.fault, OSError)):
            raise self.fault

    def finish(self) -> None:
        """Waits until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()

    def _try(self, folder: str, work: Callable[[], None]) -> None:
        """Does the work; an error is kept in `fault`, since in a thread it would be lost."""
        try:
            work()
            return
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
        except BaseException as error:  # noqa: BLE001 - raised by `check`
            self.fault = error
        if self._store is not None:
            with suppress(RuntimeError):  # rank 0, which waits for this rank's part, has gone
                self._store.set(_failed(folder), "")

    def _write(self, folder: str, position: Position, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """This rank's part, and on rank 0 the rest. What goes to a server is written to this machine's disk first."""
        rank, trainer = self.engine.accelerator.process_index, storage.join(folder, TRAINER)
        with cache.tmp_dir() if self.remote else nullcontext(Path(trainer)) as here:
            part = here / STATE_FILE.format(rank)
            if self.engine.writes_state:
                save_weights(tensors, part, {**metadata, **checksums(tensors)})
                if self.remote:
                    s3.upload(part, storage.join(trainer, part.name))
            if rank == 0:
                writers = position.ranks if self.engine.all_write_state else 1
                names = [STATE_FILE.format(writer) for writer in range(writers)]
                self._wait_for(names, folder)
                self._complete(folder, position, [part, *(storage.join(trainer, name) for name in names[1:])])

    def _wait_for(self, parts: list[str], folder: str) -> None:
        # Twice the limit: where nothing else goes on, the watchdog then has named who is gone.
        patience, trainer = 2 * self.config.engine.timeout_s, storage.join(folder, TRAINER)
        deadline = time.monotonic() + patience
        while missing := sorted(set(parts) - set(storage.list_folder(trainer))):
            if self._store is not None and self._store.check([_failed(folder)]):
                raise FileError("another rank could not write its part, and has said why")
            if time.monotonic() > deadline:
                raise FileError(f"{', '.join(missing)} did not come in {patience:.0f} s")
            time.sleep(0.5 if self.remote else 0.01)

    def _complete(self, folder: str, position: Position, parts: list[str | Path]) -> None:
        """Adds what everyone reads to a checkpoint whose `parts`, those of all ranks, are there."""
        saved, specs, config = SavedState(parts), weight_specs(self.world), self.config
        for name, kind in WEIGHTS.items():
            with storage.writing(storage.join(folder, f"{name}.safetensors")) as file:
                save_weights(saved.whole(kind, specs), file, {"step": str(position.step)})
        resume = config.resume and absolute(config.resume)  # for readers who start elsewhere
        for name, settings in (("config.yaml", replace(config, resume=resume)), (WORLD_FILE, self.world)):
            with storage.writing(storage.join(folder, name)) as file:
                save_config(settings, file)
        storage.write_text(storage.join(folder, f"{TRAINER}/{POSITION}"), json.dumps(asdict(position)))
        keep_codec(config.codec, config.out)
        push(config.folder, config.out)
        write_complete(folder, format=FORMAT, step=position.step)
        remove_superseded(config.out, config.checkpoint)


def _failed(folder: str) -> str:
    """The key of the store under which a rank says that it cannot write its part of the checkpoint `folder`."""
    return f"worldloom/failed/{folder}"


def remove_superseded(run: str, config: CheckpointConfig) -> None:
    """Deletes the checkpoints of `run` that need not be kept, and what unfinished saves have left: only folders with
    the names that checkpoints get, and of a link to one, the link. What cannot be deleted is said."""
    whole = complete_steps(run)
    kept = whole[-config.keep_last :]
    kept += [name for name in whole if config.keep_every and int(name[-7:]) % config.keep_every == 0]
    steps = [name.rstrip("/") for name in fnmatch.filter(storage.list_folder(run), f"{STEP_FOLDERS}/")]
    for folder in (storage.join(run, name) for name in steps if name not in kept):
        try:
            storage.remove_folder(folder, COMPLETE)  # COMPLETE first: a kill here leaves nothing that looks whole
        except OSError as error:  # the new checkpoint is there
            tqdm.write(f"train run: cannot delete {folder}: {one_line(error)}", file=sys.stderr)
