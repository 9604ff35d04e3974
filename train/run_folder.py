"""The folder of a run: one run at a time has it, and in two places if `out` is an s3:// url.

Such a run works in a folder of this machine, whose files can be appended to and locked. Checkpoints go straight to the
url; everything else in the folder is copied there before each of them, and at the end.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from configs import storage
from configs.errors import UserError, one_line
from configs.lease import sole_writer
from configs.untrusted import parse_object
from model.world import STEP_FOLDERS
from train.config import TrainConfig
from train.engine import gather_objects
from train.exit import STOPPED
from train.trackers import METRICS, WANDB_ID

PUSHED = ".pushed.json"  # which files were copied, and when they had changed last


@contextmanager
def sole_run(config: TrainConfig, rank: int = 0) -> Iterator[None]:
    """Rank 0 holds the run's folder, and its url if it has one. All ranks must call, and all raise UserError if it
    cannot, such as while another live run holds them."""
    folder, url, refused = config.folder, config.out, ""
    with ExitStack() as stack:
        try:
            if rank == 0:
                stack.enter_context(sole_writer(folder, "run", url))
                if storage.is_s3(url):
                    storage.remove(storage.join(url, STOPPED))
                    pull(folder, url)
                (folder / STOPPED).unlink(missing_ok=True)
        except (UserError, OSError) as error:
            refused = one_line(error)
        if refused := gather_objects(refused)[0]:
            raise UserError(refused)
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the first error is the one that counts
                push(folder, url if rank == 0 else "")
            raise
        push(folder, url if rank == 0 else "")


def pull(folder: Path, url: str) -> None:
    """Fetches the run's metrics so far, and its name at wandb, if it ever ran."""
    for name in (METRICS, WANDB_ID):
        with suppress(FileNotFoundError):
            storage.write_text(folder / name, storage.read_bytes(storage.join(url, name)).decode(errors="replace"))


def push(folder: Path, url: str) -> None:
    """Copies what has changed in the folder since the last time to an s3:// url, but for names that begin with a dot,
    links that lead out of the folder, and checkpoints."""
    if not storage.is_s3(url):
        return
    pushed: dict[str, int] = {}
    with suppress(FileNotFoundError, ValueError):  # damaged: all is copied again
        pushed = parse_object((folder / PUSHED).read_bytes(), folder / PUSHED)
    here = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        ours = path.is_file() and path.resolve().is_relative_to(here)
        skipped = "/." in f"/{name}" or fnmatch(name, f"{STEP_FOLDERS}/*")
        if ours and not skipped and pushed.get(name) != (changed := path.stat().st_mtime_ns):
            with storage.writing(storage.join(url, name)) as part:
                shutil.copyfile(path, part)  # it may grow meanwhile
            pushed[name] = changed
    storage.write_text(folder / PUSHED, json.dumps(pushed))
