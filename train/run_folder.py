"""The folder of a run: whose it is while the run lives, and its two places if `out` is an s3:// url.

Such a run works in a folder of this machine, whose files can be appended to and locked. Checkpoints go straight to the
url; everything else in the folder is copied there before each of them, and at the end.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from configs import cache, storage
from configs.errors import UserError, one_line
from configs.files import sole_writer, write_text
from configs.foreign import parse_object
from data_pipeline.claims import claimed
from model.world import STEP_FOLDERS
from train.checkpoint import absolute
from train.config import STOPPED, TrainConfig
from train.engine import gather_objects
from train.log import METRICS
from train.trackers import WANDB_ID

PUSHED = ".pushed.json"  # which files were copied, as they were then


def with_local_out(config: TrainConfig) -> TrainConfig:
    """The config with an `out` on this machine, a folder that is made; if it was an s3:// url, that becomes
    `checkpoint.folder`."""
    if not storage.is_s3(config.out):
        return config
    url = config.out.rstrip("/")
    folder = cache.run_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    return replace(config, out=str(folder), checkpoint=replace(config.checkpoint, folder=url))


def as_asked(config: TrainConfig) -> TrainConfig:
    """The opposite of `with_local_out`, for whoever reads the config on another machine."""
    resume = config.resume and absolute(config.resume)
    return replace(config, out=config.checkpoints, resume=resume, checkpoint=replace(config.checkpoint, folder=None))


@contextmanager
def sole_run(config: TrainConfig) -> Iterator[None]:
    """Holds the run's folder, and its url if it has one, within the block: two runs that write to the same place would
    spoil each other's checkpoints. What killed ones left unfinished at the url is deleted.

    Raises ValueError in one line if another live run holds them, OSError if they cannot be written to.
    """
    folder, url = Path(config.out), config.checkpoints
    with sole_writer(folder, "run"), claimed(url, "run") if storage.is_s3(url) else nullcontext():
        if storage.is_s3(url):
            storage.remove_unfinished(url)
            storage.remove(storage.join(url, STOPPED))
            pull(folder, url)
        (folder / STOPPED).unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            with suppress(OSError):  # what went wrong first is what counts
                push(folder, url)
            raise
        push(folder, url)


@contextmanager
def held_run_folder(config: TrainConfig, rank: int) -> Iterator[None]:
    """Holds the run's folder within the block, on rank 0. All ranks must call; if it cannot be had, each of them raises
    ValueError in one line."""
    with ExitStack() as held:
        refused = ""
        if rank == 0:
            try:
                held.enter_context(sole_run(config))
            except (UserError, OSError) as error:
                refused = one_line(error)
        if refused := gather_objects(refused)[0]:
            raise UserError(refused)
        yield


def pull(folder: Path, url: str) -> None:
    """The run's figures so far, and its name at wandb, if it ever ran: those at the url are of all up to its newest
    checkpoint."""
    for name in (METRICS, WANDB_ID):
        with suppress(FileNotFoundError):
            write_text(folder / name, storage.read_bytes(storage.join(url, name)).decode(errors="replace"))


def push(folder: Path, url: str) -> None:
    """Copies what is in the folder and has changed since the last time to an s3:// url; nothing whose name begins with
    a dot, and nothing that a link finds outside of the folder."""
    if not storage.is_s3(url):
        return
    pushed: dict[str, int] = {}
    with suppress(FileNotFoundError, ValueError):  # damaged: all is copied again
        pushed = parse_object((folder / PUSHED).read_bytes(), folder / PUSHED)
    here = folder.resolve()
    files = (path for path in folder.rglob("[!.]*") if path.is_file() and path.resolve().is_relative_to(here))
    for path in sorted(files):
        name, changed = str(path.relative_to(folder)), path.stat().st_mtime_ns
        checkpoint = fnmatch(name, f"{STEP_FOLDERS}/*")  # of a time when the run was here alone
        if not checkpoint and pushed.get(name) != changed:
            with storage.writing(storage.join(url, name)) as part:
                shutil.copyfile(path, part)  # it may grow meanwhile
            pushed[name] = changed
    write_text(folder / PUSHED, json.dumps(pushed))
