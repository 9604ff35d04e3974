"""The folder of a run: held by one run at a time, and in two places if `out` is an s3:// url.

Such a run works in a folder of this machine, whose files can be appended to and locked. Checkpoints go straight to the
url; everything else in the folder is copied there before each of them, and at the end.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from configs import cache, storage
from configs.errors import UserError, one_line
from configs.files import sole_writer, this_machine, write_text
from configs.foreign import parse_object
from configs.s3_errors import NotOffered
from model.world import STEP_FOLDERS
from train.checkpoint import absolute
from train.config import TrainConfig
from train.engine import gather_objects
from train.exit import STOPPED
from train.trackers import METRICS, WANDB_ID

PUSHED = ".pushed.json"  # which files were copied, and when they had changed last
LEASE = "run.claim"  # at the url: which run holds it
EXPIRED_S = 30.0  # after so long without a renewal the holder of a lease is gone


def with_local_out(config: TrainConfig) -> TrainConfig:
    """The config with an `out` on this machine, a folder that is made; an s3:// url becomes `checkpoint.folder`."""
    if not storage.is_s3(config.out):
        return config
    url = config.out.rstrip("/")
    folder = cache.run_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    return replace(config, out=str(folder), checkpoint=replace(config.checkpoint, folder=url))


def as_asked(config: TrainConfig) -> TrainConfig:
    """The opposite of `with_local_out`, for readers on other machines."""
    resume = config.resume and absolute(config.resume)
    return replace(config, out=config.checkpoints, resume=resume, checkpoint=replace(config.checkpoint, folder=None))


@contextmanager
def sole_run(config: TrainConfig) -> Iterator[None]:
    """Holds the run's folder, and its url if it has one: two runs would spoil each other's checkpoints. What killed
    runs left unfinished at the url is deleted. Raises UserError if another live run holds them."""
    folder, url = Path(config.out), config.checkpoints
    with sole_writer(folder, "run"), lease(url, folder) if storage.is_s3(url) else nullcontext():
        if storage.is_s3(url):
            storage.remove_unfinished(url)
            storage.remove(storage.join(url, STOPPED))
            pull(folder, url)
        (folder / STOPPED).unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the first error is the one that counts
                push(folder, url)
            raise
        push(folder, url)


@contextmanager
def held_run_folder(config: TrainConfig, rank: int) -> Iterator[None]:
    """`sole_run` on rank 0. All ranks must call, and all raise UserError if the folder cannot be had."""
    with ExitStack() as stack:
        refused = ""
        if rank == 0:
            try:
                stack.enter_context(sole_run(config))
            except (UserError, OSError) as error:
                refused = one_line(error)
        if refused := gather_objects(refused)[0]:
            raise UserError(refused)
        yield


@contextmanager
def lease(url: str, folder: Path) -> Iterator[None]:
    """Holds the s3 `url` for the run that has locked its `folder` on this machine, if the server can create a file only
    once. The lease is renewed; one that is not any more is taken over. Raises UserError if another run holds it."""
    place, holder, ended = storage.join(url, LEASE), f"{this_machine()} {folder}", threading.Event()

    def renew() -> None:
        for number in range(1, 1 << 62):
            if ended.wait(EXPIRED_S / 4):
                return
            with suppress(OSError):  # the next one may succeed
                storage.write_text(place, json.dumps({"holder": holder, "renewed": number}))

    try:
        _acquire(place, holder)
    except NotOffered:
        yield
        return
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        storage.remove(place)


def _acquire(place: str, holder: str) -> None:
    text = json.dumps({"holder": holder, "renewed": 0})
    if storage.create(place, text.encode()):
        return
    with suppress(FileNotFoundError):  # released meanwhile
        before, deadline = storage.read_bytes(place), time.monotonic() + EXPIRED_S
        # A lease of the same holder is of a killed run: this one has its lock.
        while json.dumps(holder).encode() not in before and time.monotonic() < deadline:
            time.sleep(EXPIRED_S / 30)
            if storage.read_bytes(place) != before:
                raise UserError(f"{storage.parent(place)} is in use by another run (see {LEASE}); choose another out=")
        storage.remove(place)
    if not storage.create(place, text.encode()):
        raise UserError(f"{storage.parent(place)} is in use by another run (see {LEASE}); choose another out=")


def pull(folder: Path, url: str) -> None:
    """Fetches the run's metrics so far, and its name at wandb, if it ever ran."""
    for name in (METRICS, WANDB_ID):
        with suppress(FileNotFoundError):
            write_text(folder / name, storage.read_bytes(storage.join(url, name)).decode(errors="replace"))


def push(folder: Path, url: str) -> None:
    """Copies what has changed in the folder since the last time to an s3:// url; neither names that begin with a dot,
    nor what a link finds outside of the folder, nor checkpoints of a time when the run was here alone."""
    if not storage.is_s3(url):
        return
    pushed: dict[str, int] = {}
    with suppress(FileNotFoundError, ValueError):  # damaged: all is copied again
        pushed = parse_object((folder / PUSHED).read_bytes(), folder / PUSHED)
    here = folder.resolve()
    for path in sorted(folder.rglob("[!.]*")):
        name = str(path.relative_to(folder))
        ours = path.is_file() and path.resolve().is_relative_to(here) and not fnmatch(name, f"{STEP_FOLDERS}/*")
        if ours and pushed.get(name) != (changed := path.stat().st_mtime_ns):
            with storage.writing(storage.join(url, name)) as part:
                shutil.copyfile(path, part)  # it may grow meanwhile
            pushed[name] = changed
    write_text(folder / PUSHED, json.dumps(pushed))
