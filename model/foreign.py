"""Weights that others made, read without running code in them."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.weights import load_weights

# What torch.load raises for a file that is cut off, damaged or none of its own.
UNREADABLE = (RuntimeError, EOFError, KeyError, ValueError)


def load_foreign(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or a torch (.pth, .pt, .bin) file, on the CPU; the latter memory-mapped if possible.

    Code in a pickle is never run. Raises ValueError in one line for such a file and for one that is damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_weights(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to run {asked[1]}" if asked else "holds more than tensors"
        raise ValueError(
            f"{path} {what}; it was not run: get the file from its makers, as safetensors if any"
        ) from error
    except UNREADABLE as error:
        raise ValueError(f"{path} is damaged or no torch file; copy or download it again") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(one, Tensor) for one in loaded.values()):
        raise ValueError(f"{path} must hold a flat dict of names to tensors, as the official files do")
    return dict(loaded)


def read_json(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file. Raises ValueError in one line for a file that holds none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config file {path}")
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold keys and values at its top level")
    return loaded
