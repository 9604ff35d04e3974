"""Arrays of numbers in .npy files, also in those that hold a pickled dict of arrays, of which nothing else is made."""

import io
import math
import pickle
import re
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.errors import MissingFileError, UserError
from configs.foreign import reading

KINDS = re.compile("[biuf][1248]")  # bool, whole numbers, floats


def read_npy(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npy file by their names in its dict; "" is the name of one that is all of the file.

    Raises UserError for a file that holds anything but numbers, and for a pickle that makes anything but arrays.
    """
    if not path.is_file():
        raise MissingFileError(f"no file {path}")
    with reading(path):
        file = io.BytesIO(path.read_bytes())
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise UserError(f"its version is {version}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, fortran, dtype = header(file)
        except (SyntaxError, tokenize.TokenError) as error:
            raise UserError(f"its header is damaged: {error}") from error
        if not dtype.hasobject:
            return {"": _shape(file.read(), dtype.str, shape, fortran)}
        outer = _Arrays(file, path).load()
        found = outer.held[0] if isinstance(outer, _Array) and isinstance(outer.held, list) and outer.held else None
        if math.prod(shape) != 1 or not isinstance(found, dict):
            raise UserError("it holds neither an array nor a dict of arrays")
        arrays = {str(name): value.held for name, value in found.items() if isinstance(value, _Array)}
        return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}


def _shape(data: bytes, dtype: str, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    """The array that `data` is."""
    if not KINDS.fullmatch(np.dtype(dtype).str[1:]):
        raise UserError(f"it holds {dtype!r:.80}, no numbers")
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape, order="F" if fortran else "C")


class _Array:
    """Stands for an array until its numbers come; a hostile pickle could give numpy's own ones any memory to read."""

    __slots__ = ("held",)

    def __init__(self, *args: Any) -> None:
        self.held: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.held = data if dtype.name[:1] == "O" else _shape(bytes(data), dtype.order + dtype.name, shape, fortran)


class _Dtype:
    """Stands for the type of an array's numbers."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, *args: Any) -> None:
        self.name, self.order = str(name), "|"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])


class _Maker:
    """What a pickle may call; it has nothing that a pickle could change."""

    __slots__ = ()
    made: ClassVar[type | None] = None

    def __call__(self, *args: Any) -> Any:
        return self.made(*args) if self.made else None


class _MakeArray(_Maker):
    __slots__ = ()
    made = _Array


class _MakeDtype(_Maker):
    __slots__ = ()
    made = _Dtype


ADMITTED: dict[str, Callable[[], _Maker]] = {
    "numpy.core.multiarray._reconstruct": _MakeArray,
    "numpy._core.multiarray._reconstruct": _MakeArray,
    "numpy.ndarray": _Maker,
    "numpy.dtype": _MakeDtype,
}


class _Arrays(pickle._Unpickler):
    """Admits numpy arrays alone. It is Python's, since the one in C takes as much memory as a file asks for."""

    # The one instruction that takes memory before its bytes are there; arrays in .npy files do without.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> _Maker:
        wanted = f"{module}.{name}"
        if wanted not in ADMITTED:
            raise UserError(f"{self.path} wants to run {wanted[:80]!r}; only numpy arrays are read of it")
        return ADMITTED[wanted]()
