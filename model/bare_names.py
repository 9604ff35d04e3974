"""The bare names of a model's weights in files in which trainers wrapped the names or stored several sets."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

# What DDP, FSDP, torch.compile and activation checkpointing put before, or into the middle of, every name.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
WRAPPED = re.compile(rf"(?:^|(?<=[./]))({'|'.join(WRAPPERS)})[./]")
AVERAGE = re.compile(r"(.+_)?(ema|average|averaged)([_.\d].*)?")  # of the weights over the steps of training
OTHERS = re.compile(r"critic|discriminator|fake|real|optim|sched|loss")  # sets of what else was trained
# Sets that hold the model, the likeliest first. Of no model of ours is a whole part called so.
MODELS = (
    "generator", "model", "state_dict", "model_state_dict", "generator_state_dict", "student", "diffusion_model", "dit",
    "network", "net", "params", "state", "weights",
)  # fmt: skip
ALONE = ("transformer", "vae")  # also names of parts: taken off only where all names carry it
OFFICIAL_PREFIX = "model."  # of every name in the distilled official files; the base file has none


@dataclass(frozen=True)
class BareNames:
    """Which tensors of a file are the model's, and their own names."""

    names: Mapping[str, str]  # by those in the file
    path: str  # before all of them in the file; of mappings in mappings the keys, each with a `/`
    wrappers: tuple[str, ...]  # taken out of the names
    skipped: tuple[str, ...]  # sets of tensors in the same file that are not the model's

    @property
    def prefix(self) -> str:
        """What all names began with inside their mapping."""
        return self.path.rpartition("/")[2]

    def say(self, where: str) -> None:
        """One line on stderr about the file `where`, unless it had the bare names or the official prefix."""
        if self.path in ("", OFFICIAL_PREFIX) and not (self.wrappers or self.skipped):
            return
        notes = [f"the weights under {self.path} are taken"] if self.path else []
        notes += [f"{', '.join(self.skipped)} left out"] if self.skipped else []
        notes += [f"{', '.join(self.wrappers)} taken off the names"] if self.wrappers else []
        tqdm.write(f"note: {where}: {'; '.join(notes)}", file=sys.stderr)


def bare_names(specs: Mapping[str, Tensor]) -> BareNames:
    """The names of the model's weights among tensors like `specs`: of several sets the newest average's, else those of
    the model."""
    names = {name: WRAPPED.sub("", name) for name in specs}
    wrappers = tuple(dict.fromkeys(wrapper for name in names for wrapper in WRAPPED.findall(name)))
    path, skipped = "", []
    while True:
        # Averages keep counters beside the weights: n_averaged, step.
        names = {old: new for old, new in names.items() if _head(new) or specs[old].ndim}
        heads = list(dict.fromkeys(map(_head, names.values())))
        head = _choose(heads)
        if not head:
            return BareNames(names, path, wrappers, tuple(skipped))
        skipped += [other[:-1] for other in heads if other not in ("", head)]
        names = {old: new.removeprefix(head) for old, new in names.items() if new.startswith(head)}
        path += head


def _head(name: str) -> str:
    """The first part of a name, with the `/` or `.` that ends it; nothing if there is just one."""
    match = re.match(r"[^/]*/|[^./]+\.", name)
    return match[0] if match else ""


def _choose(heads: list[str]) -> str | None:
    """Which of the `heads` of all names to look into, if any."""
    usable = [head for head in heads if head and not OTHERS.search(head)]
    averages = [head for head in usable if AVERAGE.fullmatch(head[:-1])]
    if averages:  # generator_ema before ema, ema_2000 before ema_1000
        numbers = {head: [int(number) for number in re.findall(r"\d+", head)] for head in averages}
        return max(averages, key=lambda head: (head.startswith(MODELS), numbers[head]))
    models = [head for model in MODELS for head in usable if head[:-1] == model]
    sole = len(heads) == 1 and usable and (heads[0].endswith("/") or heads[0][:-1] in ALONE)
    return models[0] if models else heads[0] if sole else None
