"""Weights that others made, read without running code in them."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.foreign import parse_object, reading
from model.weights import DTYPE_NAMES, INDEX_SUFFIX, LazyWeights, bare_weights, finite, lazily, open_weights

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def load_foreign(path: str | Path) -> LazyWeights:
    """The weights of the model in a file of others (see `open_foreign`), under their bare names, which are said where
    they were others. Reading one that holds NaN or infinity raises ValueError in one line."""
    return finite(bare_weights(open_foreign(path)))


def open_foreign(path: str | Path) -> LazyWeights:
    """The tensors of a safetensors file, an index of shards or a torch (.pth, .pt, .bin) file, under the names there;
    of mappings in mappings the keys are joined with `/`. A torch file is memory-mapped if possible.

    Code in a pickle is never run. Raises ValueError in one line for such a file and for one that is damaged.
    """
    path = storage.local(path)
    if path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
        return open_weights(path)
    if not path.is_file():
        raise MissingFileError(f"no weights file {path}")
    with reading(path):
        tensors = dict(_tensors(_unpickled(path), set()))
        unfit = [name for name, one in tensors.items() if one.dtype not in DTYPE_NAMES or one.layout != torch.strided]
        if unfit or not tensors or any(one.is_meta for one in tensors.values()):
            raise UserError(f"{path} must hold names and plain tensors, {unfit[0] if unfit else 'and has none'}")
        return replace(lazily(tensors), where=str(path))


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to run {asked[1]}" if asked else "holds more than tensors"
        raise UserError(
            f"{path} {what}; it was not run: get the file from its makers, as safetensors if any"
        ) from error
    except (RuntimeError, AssertionError) as error:  # torch's own for a file that is cut off
        raise UserError(f"{path} is damaged or no torch file; copy or download it again") from error


def _tensors(loaded: Any, seen: set[int], where: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in mappings of mappings; what else lies in them (steps, settings, lists) is passed over, and so is a
    mapping that was `seen`: a few that hold each other twice would unfold to more than any memory."""
    if not isinstance(loaded, Mapping) or id(loaded) in seen:
        return
    seen.add(id(loaded))
    for key, value in loaded.items():
        if isinstance(value, Tensor):
            yield f"{where}{key}", value.detach()
        else:
            yield from _tensors(value, seen, f"{where}{key}/")


def read_json(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file. Raises ValueError in one line for a file that holds none."""
    if not Path(path).is_file():
        raise MissingFileError(f"no config file {path}")
    return parse_object(Path(path).read_bytes(), path)
