"""Weights in and out: safetensors files that appear whole or not at all."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.files import atomic_path

OFFICIAL_PREFIX = "model."  # of every key in the distilled official files; the base file has none


def save_weights(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the tensors to `path` atomically; shared or strided ones become copies of their own."""
    contiguous = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    with atomic_path(path) as part:
        save_file(contiguous, part, metadata={"format": "pt", **(metadata or {})})


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises ValueError in one line for a file that is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file: {error}") from error


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies `state` into the module's parameters and buffers; every one must be there, with its shape.

    The official prefix `model.` is taken off where all keys carry it. Raises ValueError in one line otherwise.
    """
    own = module.state_dict()
    if state and all(name.startswith(OFFICIAL_PREFIX) for name in state) and not set(state) & set(own):
        state = {name.removeprefix(OFFICIAL_PREFIX): tensor for name, tensor in state.items()}
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "misshapen": misshapen,
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"these weights are of another {type(module).__name__}: {found}")
    module.load_state_dict(dict(state))


def sha256_file(path: str | Path, chunk_mb: int = 4) -> str:
    """The SHA-256 of a file as hex digits, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_mb << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
