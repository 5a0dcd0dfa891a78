"""oneDNN, called directly: the library, layouts of operands, and primitives. The kernels are in primitives.py.

Paddle's CPU wheel contains oneDNN 3.6 and calls it from operators of its own; but those convert layouts back and forth,
sum a bias gradient in a reference loop, and compute wrong gradients of four-dimensional products (Paddle 3.3.1). Here
the same library is called through its C interface (oneapi-src/oneDNN, include/oneapi/dnnl/dnnl.h) on operands in place:
a transposed operand has other strides and is not a copy.

An operand is an address and a `Layout`. A primitive is made once for its layouts, and cached. The numbers below are
enum values of one oneDNN version, so `is_supported` compares the library's version first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.text import say
from vit_static.parallel.mesh import rank_and_world_size

_SUPPORTED_VERSION = (3, 6)  # major, minor

_DATA_TYPES = {"float32": 3, "bfloat16": 2}
_BYTES = {"float32": 4, "bfloat16": 2}
_CPU, _IN_ORDER = 1, 1
_MAX_DIMENSIONS = 12


@dataclass(frozen=True)
class Layout:
    """The memory layout of an operand: dtype (float32 or bfloat16), shape, and strides in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def transposed(self) -> Layout:
        """Exchange the last two dimensions, of the same memory."""
        (*outer, rows, columns), (*outer_strides, row, column) = self.shape, self.strides
        return Layout(self.dtype, (*outer, columns, rows), (*outer_strides, column, row))

    def permuted(self, order: Sequence[int]) -> Layout:
        """Permute the dimensions, of the same memory."""
        return Layout(
            self.dtype, tuple(self.shape[axis] for axis in order), tuple(self.strides[axis] for axis in order)
        )

    def reshaped(self, shape: Sequence[int]) -> Layout | None:
        """Return the layout of the same memory in another shape, or None if the strides don't allow it."""
        like = np.lib.stride_tricks.as_strided(np.empty(1, np.int8), self.shape, self.strides)
        try:
            reshaped = np.reshape(like, shape, copy=False)
        except ValueError:
            return None
        return Layout(self.dtype, reshaped.shape, reshaped.strides)

    def first(self, *lengths: int) -> Layout:
        """Limit the first dimensions to these lengths."""
        return Layout(self.dtype, (*lengths, *self.shape[len(lengths) :]), self.strides)

    def offset(self, *indices: int) -> int:
        """Return the bytes from the first element to the one at these indices of the first dimensions."""
        return _BYTES[self.dtype] * sum(index * stride for index, stride in zip(indices, self.strides, strict=False))


def dense(dtype: str, *shape: int) -> Layout:
    """Return the layout of a contiguous tensor."""
    strides, length = [], 1
    for size in reversed(shape):
        strides.append(length)
        length *= size
    return Layout(dtype, shape, tuple(reversed(strides)))


_OUT_OF_MEMORY = 1  # dnnl_status_t


class _Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    """The first fields of dnnl_version_t."""

    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


def check(name: str, status: int) -> None:
    """Raise RuntimeError if a function of the C interface returned an error, and MemoryError for want of memory."""
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"oneDNN: dnnl_{name}")
    if status != 0:
        raise RuntimeError(f"oneDNN: dnnl_{name} failed with status {status}")


class _Library:
    """The loaded library with one CPU engine and one stream, which run each primitive at once on OpenMP's threads."""

    def __init__(self) -> None:
        self._functions = _load()
        self.engine = self.make("engine", ctypes.c_int(_CPU), ctypes.c_size_t(0))
        self.stream = self.make("stream", self.engine, ctypes.c_uint(_IN_ORDER))

    def call(self, name: str, *arguments: Any) -> None:
        check(name, self.function(name)(*arguments))

    def function(self, name: str) -> Callable[..., int]:
        """Return a function of the C interface, which returns 0 or the number of an error."""
        return getattr(self._functions, f"dnnl_{name}")

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Return a new object of the C interface. They live until the process ends: primitives are cached."""
        handle = ctypes.c_void_p()
        self.call(f"{name}_create", ctypes.byref(handle), *arguments)
        return handle

    def description(self, layout: Layout) -> ctypes.c_void_p:
        """Return the memory descriptor of a layout."""
        # The strides of dimensions of length 1 have no meaning, but they decide which kernel is chosen: unless they are
        # those of a contiguous tensor, a product of [M, 1] and [1, N] writes nothing, without an error.
        strides, following = list(layout.strides), 1
        for axis in reversed(range(len(strides))):
            if layout.shape[axis] == 1:
                strides[axis] = following
            following = layout.shape[axis] * strides[axis]
        sizes = ctypes.c_int64 * _MAX_DIMENSIONS
        handle = ctypes.c_void_p()
        self.call(
            "memory_desc_create_with_strides",
            ctypes.byref(handle),
            ctypes.c_int(len(layout.shape)),
            sizes(*layout.shape),
            ctypes.c_int(_DATA_TYPES[layout.dtype]),
            sizes(*strides),
        )
        return handle


@cache
def library() -> _Library:
    """Return the library, loaded when it is first needed."""
    return _Library()


def _load() -> ctypes.CDLL:
    import paddle  # also loads the libraries that oneDNN depends on

    return ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"))


def library_version() -> tuple[int, int, int] | None:
    """Return the version of the oneDNN library in Paddle's wheel: major, minor, patch; None without oneDNN 3."""
    try:
        dnnl_version = _load().dnnl_version
    except (OSError, AttributeError):  # another file name, or a library without this function
        return None
    dnnl_version.restype = ctypes.POINTER(_Version)
    version = dnnl_version().contents
    return version.major, version.minor, version.patch


def why_unsupported(version: tuple[int, int, int] | None) -> str | None:
    """Return one line that says why the kernels don't run with this oneDNN version, or None if they do."""
    if version is not None and version[:2] == _SUPPORTED_VERSION:
        return None
    name = "no oneDNN 3" if version is None else f"oneDNN {'.'.join(map(str, version))}"
    return (
        f"{name} in Paddle's wheel: the CPU kernels need {_SUPPORTED_VERSION[0]}."
        f"{_SUPPORTED_VERSION[1]}, so Paddle's own kernels run, which are slower; install the pinned version of Paddle"
    )


@cache
def is_supported() -> bool:
    """Return whether the library's version is supported. If it isn't, rank 0 says so, once per process."""
    reason = why_unsupported(library_version())
    if reason is not None and rank_and_world_size()[0] == 0:
        say(reason)
    return reason is None


class Memory:
    """An operand of primitives: a layout at an address, which can be changed. It keeps no reference to the memory."""

    def __init__(self, layout: Layout, address: int = 0) -> None:
        onednn = library()
        self.handle = onednn.make("memory", onednn.description(layout), onednn.engine, ctypes.c_void_p(address))
        self._set_address = onednn.function("memory_set_data_handle")

    def move(self, address: int) -> None:
        check("memory_set_data_handle", self._set_address(self.handle, ctypes.c_void_p(address)))


class Execution:
    """A primitive with memories of its own, for a kernel that runs many small ones: a call passes no addresses."""

    def __init__(self, primitive: ctypes.c_void_p, operands: list[tuple[int, Memory]]) -> None:
        onednn = library()
        self._memories = [memory for _, memory in operands]  # kept, as the arguments refer to them
        numbered = [_Argument(number, memory.handle.value) for number, memory in operands]
        self._arguments = (_Argument * len(operands))(*numbered)
        self._execute = onednn.function("primitive_execute")
        self._call = (primitive, onednn.stream, len(operands), self._arguments)

    def __call__(self) -> None:
        status = self._execute(*self._call)  # on a CPU it returns when the primitive has finished
        if status:
            check("primitive_execute", status)


class Primitive:
    """One kernel for fixed layouts; call it with its operands' addresses, in the order of `operands`.

    `operands` are (number, layout), `description` is the primitive descriptor. It keeps no reference to the memory.
    """

    def __init__(self, description: ctypes.c_void_p, operands: list[tuple[int, Layout]]) -> None:
        onednn = library()
        self._primitive = onednn.make("primitive", description)
        self._numbers = [number for number, _ in operands]
        self._memories = [
            onednn.make("memory", onednn.description(layout), onednn.engine, ctypes.c_void_p())
            for _, layout in operands
        ]
        numbered = [
            _Argument(number, memory.value) for (number, _), memory in zip(operands, self._memories, strict=True)
        ]
        self._arguments = (_Argument * len(operands))(*numbered)

        self._addresses: tuple[int, ...] = (0,) * len(operands)
        # Looked up once: a small kernel takes less time than to find a function by its name.
        self._set_address, self._execute = (
            onednn.function(name) for name in ("memory_set_data_handle", "primitive_execute")
        )
        self._call = (self._primitive, onednn.stream, len(operands), self._arguments)

    def on(self, *memories: Memory) -> Execution:
        """Return this kernel on these operands, in the order of `operands`."""
        return Execution(self._primitive, list(zip(self._numbers, memories, strict=True)))

    def __call__(self, *addresses: int) -> None:
        if addresses != self._addresses:
            for memory, address, before in zip(self._memories, addresses, self._addresses, strict=True):
                if address != before:
                    check("memory_set_data_handle", self._set_address(memory, ctypes.c_void_p(address)))
            self._addresses = addresses
        status = self._execute(*self._call)  # on a CPU it returns when the primitive has finished
        if status:
            check("primitive_execute", status)
