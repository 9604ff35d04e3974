"""Weights that third parties made, read without running code in them."""

import errno
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.untrusted import parse_object, reading
from model.weights import DTYPE_NAMES, INDEX_SUFFIX, LazyWeights, bare_weights, lazily, open_weights

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def load_third_party(path: str | Path) -> LazyWeights:
    """The model's weights (see `bare_weights`) in a safetensors file, an index of shards or a torch (.pth, .pt, .bin)
    file, where the keys of mappings in mappings are joined with `/`. Code in a pickle is never run."""
    path = storage.local(path)
    if path.suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
        return bare_weights(open_weights(path))
    if not path.is_file():
        raise MissingFileError(f"no weights file {path}")
    with reading(path):
        tensors = dict(_tensors(_unpickle(path), set()))
        plain = [tensor.dtype in DTYPE_NAMES and tensor.layout == torch.strided for tensor in tensors.values()]
        if not tensors or not all(plain) or any(tensor.is_meta for tensor in tensors.values()):
            raise UserError(f"{path} must hold names and plain tensors")
    return bare_weights(replace(lazily(tensors), where=str(path)))


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to run {code[1]}" if code else "holds more than tensors"
        raise UserError(f"{path} {what}; it was not run: get the file as safetensors") from error
    except (RuntimeError, AssertionError, OSError) as error:  # torch's own for a file that is cut off
        # EINVAL without a name is torch's for a zip file whose offsets lead nowhere; other OSErrors are the disk's.
        if isinstance(error, OSError) and (error.errno != errno.EINVAL or error.filename):
            raise
        raise UserError(f"{path} is damaged or no torch file; copy or download it again") from error


def _tensors(loaded: Any, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in mappings of mappings. Skipped are other values (steps, settings, lists), and a mapping that was
    `seen`: a few that hold each other twice would unfold to more than any memory."""
    if not isinstance(loaded, Mapping) or id(loaded) in seen:
        return
    seen.add(id(loaded))
    for key, value in loaded.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        else:
            yield from _tensors(value, seen, f"{prefix}{key}/")


def read_json(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file."""
    if not Path(path).is_file():
        raise MissingFileError(f"no config file {path}")
    return parse_object(Path(path).read_bytes(), path)


def diffusers_names(part: Literal["transformer", "vae"], names: Iterable[str]) -> dict[str, str]:
    """diffusers' names for `names` of Wan's own files; those that it does not know stay as they are."""
    from diffusers.loaders import single_file_utils as diffusers

    convert = {
        "transformer": diffusers.convert_wan_transformer_to_diffusers,
        "vae": diffusers.convert_wan_vae_to_diffusers,
    }[part]
    return {ours: theirs for theirs, ours in convert({name: name for name in names}).items()}
