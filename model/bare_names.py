"""The bare names of a model's weights in files in which trainers wrapped the names or stored several sets."""

import re
import sys
from collections.abc import Mapping

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


def bare_names(specs: Mapping[str, Tensor], where: str) -> tuple[dict[str, str], str]:
    """The names of the model's weights by those in the file `where`, and what all of these began with there.

    `specs` are tensors like those of the file. Of several sets the newest average's is taken, else the model's. One
    line on stderr says so, unless the file had the bare names or the official prefix.
    """
    names = {name: WRAPPED.sub("", name) for name in specs}
    wrappers = dict.fromkeys(wrapper for name in names for wrapper in WRAPPED.findall(name))
    notes = [f"{', '.join(wrappers)} taken off the names"] if wrappers else []
    path = ""  # before all names in the file; of mappings in mappings the keys, each with a `/`
    while True:
        # Averages keep counters beside the weights: n_averaged, step.
        names = {old: new for old, new in names.items() if _head(new) or specs[old].ndim}
        heads = list(dict.fromkeys(map(_head, names.values())))
        if not (head := _choose(heads)):
            break
        notes += [f"{other[:-1]} left out" for other in heads if other not in ("", head)]
        names = {old: new.removeprefix(head) for old, new in names.items() if new.startswith(head)}
        path += head
    if notes or path not in ("", OFFICIAL_PREFIX):
        taken = [f"the weights under {path} are taken"] if path else []
        tqdm.write(f"note: {where}: {'; '.join(taken + notes)}", file=sys.stderr)
    return names, path.rpartition("/")[2]


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
