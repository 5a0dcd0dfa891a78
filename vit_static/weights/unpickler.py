"""Restricted unpickler: arrays in dicts, lists and tuples, and nothing that could run code."""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO, ClassVar

import numpy as np


class ForbiddenName(pickle.UnpicklingError):
    """A pickle refers to a function or class, `module`.`name`, that no arrays need."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"it asks for {module}.{name}, which arrays don't need")
        self.module, self.name = module, name


def load_pickle(file: BinaryIO, encoding: str = "ASCII") -> Any:
    """Load an object made of dicts, lists, tuples, strings, bytes, numbers, and a `PickledArray` for each array.

    `encoding` is that of Python 2's strings; "bytes" leaves them as they are. A damaged pickle can raise any exception,
    one that refers to anything else raises ForbiddenName.
    """
    return _Unpickler(file, encoding=encoding).load()


class PickledArray:
    """An array as pickled. NumPy doesn't create it: of forged contents it would make an array of pointers and crash."""

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def to_numpy(self) -> np.ndarray | None:
        """Return the array; None if it isn't one of integers or floating-point numbers.

        Raises ValueError if its content doesn't have as many numbers as its shape.
        """
        if not isinstance(self._state, tuple) or len(self._state) != 5:
            return None
        _, shape, dtype, is_fortran, content = self._state
        if not isinstance(dtype, _PickledDtype) or dtype.kind not in _NUMBERS:
            return None
        if not isinstance(content, bytes) or not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
            return None
        numbers = np.frombuffer(content, f"{dtype.byte_order}{dtype.kind}")
        return numbers.reshape(shape, order="F" if is_fortran else "C")


_NUMBERS = ("f2", "f4", "f8", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")


class _PickledDtype:
    """A NumPy dtype as pickled."""

    def __init__(self, kind: Any = None, *_: Any) -> None:
        self.kind, self.byte_order = _as_text(kind), "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and _as_text(state[1]) == ">":
            self.byte_order = ">"


def _as_text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value  # Python 2's strings


def _encode(text: str, _: Any) -> bytes:
    """Stand in for `_codecs.encode`, by which protocol 2 stores bytes."""
    return text.encode("latin-1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):
    # The base is Python's implementation, and BYTEARRAY8 is missing, because of memory: with C's implementation a
    # file of ten bytes allocates 64 GB for its memo, and with Python's BYTEARRAY8 fills any number of bytes with zeros.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ForbiddenName(module, name)
        return _ALLOWED[module, name]
