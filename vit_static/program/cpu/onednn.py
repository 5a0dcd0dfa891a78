"""oneDNN's kernels, called directly: matrix products, GELU, softmax, LayerNorm and conversions on CPUs.

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
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.text import say
from vit_static.parallel.mesh import rank_and_world_size

_SUPPORTED_VERSION = (3, 6)  # major, minor

_DATA_TYPES = {"float32": 3, "bfloat16": 2}
_BYTES = {"float32": 4, "bfloat16": 2}
_CPU, _IN_ORDER = 1, 1
_FORWARD_TRAINING, _BACKWARD = 64, 128
_GELU_ERF, _GELU_TANH, _LINEAR, _SOFTMAX, _ADD = 49, 43, 38, 196608, 131056
_SCALE_AND_SHIFT = 2 | 4
_MAX_DIMENSIONS = 12
# Numbers that identify a primitive's operands.
_SOURCE, _SOURCE_1, _TARGET, _WEIGHTS, _BIAS = 1, 2, 17, 33, 41
_MEAN, _VARIANCE, _SCALE, _SHIFT = 49, 50, 51, 52
_SOURCE_GRADIENT, _TARGET_GRADIENT, _SCALE_GRADIENT, _SHIFT_GRADIENT = 129, 145, 255, 256
_POST_OPERATION = 32768  # times 1 for the first post-operation, 2 for the second
_MAX_PRIMITIVES = 1024  # cached, per kind


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
def _library() -> _Library:
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


class Primitive:
    """One kernel for fixed layouts; call it with its operands' addresses, in the order of `operands`.

    `operands` are (number, layout), `description` is the primitive descriptor. It keeps no reference to the memory.
    """

    def __init__(self, description: ctypes.c_void_p, operands: list[tuple[int, Layout]]) -> None:
        library = _library()
        self._primitive = library.make("primitive", description)
        self._memories = [
            library.make("memory", library.description(layout), library.engine, ctypes.c_void_p())
            for _, layout in operands
        ]
        numbered = [
            _Argument(number, memory.value) for (number, _), memory in zip(operands, self._memories, strict=True)
        ]
        self._arguments = (_Argument * len(operands))(*numbered)

        # Looked up once: a small kernel takes less time than to find a function by its name.
        self._set_address = library.function("memory_set_data_handle")
        self._execute, self._wait = library.function("primitive_execute"), library.function("stream_wait")
        self._stream = library.stream

    def __call__(self, *addresses: int) -> None:
        for memory, address in zip(self._memories, addresses, strict=True):
            check("memory_set_data_handle", self._set_address(memory, ctypes.c_void_p(address)))
        check("primitive_execute", self._execute(self._primitive, self._stream, len(addresses), self._arguments))
        check("stream_wait", self._wait(self._stream))


@lru_cache(_MAX_PRIMITIVES)
def matmul(
    a: Layout, b: Layout, out: Layout, bias: Layout | None = None, residual: Layout | None = None, factor: float = 1.0
) -> Primitive:
    """Return the kernel of out = (a @ b [+ bias]) * factor [+ residual].

    Operands: a, b, bias and residual if given, out. All have the same number of dimensions; the bias has length 1
    where it is broadcast.
    """
    library = _library()
    chain = library.make("post_ops")
    if factor != 1.0:
        library.call(
            "post_ops_append_eltwise", chain, ctypes.c_int(_LINEAR), ctypes.c_float(factor), ctypes.c_float(0.0)
        )
    if residual is not None:
        library.call("post_ops_append_binary", chain, ctypes.c_int(_ADD), library.description(residual))
    attributes = library.make("primitive_attr")
    library.call("primitive_attr_set_post_ops", attributes, chain)
    description = library.make(
        "matmul_primitive_desc",
        library.engine,
        library.description(a),
        library.description(b),
        None if bias is None else library.description(bias),
        library.description(out),
        attributes,
    )
    residual_number = _POST_OPERATION * (2 if factor != 1.0 else 1) | _SOURCE_1
    operands = [(_SOURCE, a), (_WEIGHTS, b), (_BIAS, bias), (residual_number, residual), (_TARGET, out)]
    return Primitive(description, [(number, layout) for number, layout in operands if layout is not None])


def _gelu_forward(x: Layout, out: Layout, approximate: bool) -> ctypes.c_void_p:
    library = _library()
    return library.make(
        "eltwise_forward_primitive_desc",
        library.engine,
        ctypes.c_int(_FORWARD_TRAINING),
        ctypes.c_int(_GELU_TANH if approximate else _GELU_ERF),
        library.description(x),
        library.description(out),
        ctypes.c_float(0.0),
        ctypes.c_float(0.0),
        None,
    )


@lru_cache(_MAX_PRIMITIVES)
def gelu(x: Layout, out: Layout, approximate: bool = False) -> Primitive:
    """Return the kernel of GELU, exact or by the tanh approximation. Operands: x, out."""
    return Primitive(_gelu_forward(x, out, approximate), [(_SOURCE, x), (_TARGET, out)])


@lru_cache(_MAX_PRIMITIVES)
def gelu_grad(x: Layout, out_grad: Layout, x_grad: Layout, approximate: bool = False) -> Primitive:
    """Return the kernel of GELU's gradient. Operands: x, out_grad, x_grad."""
    library = _library()
    description = library.make(
        "eltwise_backward_primitive_desc",
        library.engine,
        ctypes.c_int(_GELU_TANH if approximate else _GELU_ERF),
        library.description(x_grad),
        library.description(out_grad),
        library.description(x),
        ctypes.c_float(0.0),
        ctypes.c_float(0.0),
        _gelu_forward(x, x, approximate),
        None,
    )
    return Primitive(description, [(_SOURCE, x), (_TARGET_GRADIENT, out_grad), (_SOURCE_GRADIENT, x_grad)])


def _softmax_forward(x: Layout, out: Layout) -> ctypes.c_void_p:
    library = _library()
    return library.make(
        "softmax_forward_primitive_desc",
        library.engine,
        ctypes.c_int(_FORWARD_TRAINING),
        ctypes.c_int(_SOFTMAX),
        library.description(x),
        library.description(out),
        ctypes.c_int(len(x.shape) - 1),
        None,
    )


@lru_cache(_MAX_PRIMITIVES)
def softmax(x: Layout, out: Layout) -> Primitive:
    """Return the kernel of softmax over the last dimension. Operands: x, out, which may be the same memory."""
    return Primitive(_softmax_forward(x, out), [(_SOURCE, x), (_TARGET, out)])


@lru_cache(_MAX_PRIMITIVES)
def softmax_grad(out: Layout, out_grad: Layout, x_grad: Layout) -> Primitive:
    """Return the kernel of softmax's gradient. Operands: out, out_grad, x_grad; the last two may be the same memory."""
    library = _library()
    description = library.make(
        "softmax_backward_primitive_desc",
        library.engine,
        ctypes.c_int(_SOFTMAX),
        library.description(x_grad),
        library.description(out_grad),
        library.description(out),
        ctypes.c_int(len(out.shape) - 1),
        _softmax_forward(x_grad, out),
        None,
    )
    return Primitive(description, [(_TARGET, out), (_TARGET_GRADIENT, out_grad), (_SOURCE_GRADIENT, x_grad)])


def _layer_norm_forward(x: Layout, out: Layout, statistics: Layout, epsilon: float) -> ctypes.c_void_p:
    library = _library()
    return library.make(
        "layer_normalization_forward_primitive_desc",
        library.engine,
        ctypes.c_int(_FORWARD_TRAINING),
        library.description(x),
        library.description(out),
        library.description(statistics),
        ctypes.c_float(epsilon),
        ctypes.c_uint(_SCALE_AND_SHIFT),
        None,
    )


@lru_cache(_MAX_PRIMITIVES)
def layer_norm(x: Layout, out: Layout, epsilon: float) -> Primitive:
    """Return the kernel of LayerNorm over the last dimension.

    Operands: x, scale, shift, out, mean, variance; it writes the last three.
    """
    statistics, channels = dense("float32", *x.shape[:-1]), dense("float32", x.shape[-1])
    return Primitive(
        _layer_norm_forward(x, out, statistics, epsilon),
        [
            (_SOURCE, x),
            (_SCALE, channels),
            (_SHIFT, channels),
            (_TARGET, out),
            (_MEAN, statistics),
            (_VARIANCE, statistics),
        ],
    )


@lru_cache(_MAX_PRIMITIVES)
def layer_norm_grad(x: Layout, out_grad: Layout, x_grad: Layout, epsilon: float) -> Primitive:
    """Return the kernel of LayerNorm's gradients.

    Operands: x, scale, shift, mean, variance, out_grad, x_grad, scale_grad, shift_grad; it writes the last three.
    """
    library = _library()
    statistics, channels = dense("float32", *x.shape[:-1]), dense("float32", x.shape[-1])
    description = library.make(
        "layer_normalization_backward_primitive_desc",
        library.engine,
        ctypes.c_int(_BACKWARD),
        library.description(x_grad),
        library.description(out_grad),
        library.description(x),
        library.description(statistics),
        ctypes.c_float(epsilon),
        ctypes.c_uint(_SCALE_AND_SHIFT),
        _layer_norm_forward(x, out_grad, statistics, epsilon),
        None,
    )
    return Primitive(
        description,
        [
            (_SOURCE, x),
            (_SCALE, channels),
            (_SHIFT, channels),
            (_MEAN, statistics),
            (_VARIANCE, statistics),
            (_TARGET_GRADIENT, out_grad),
            (_SOURCE_GRADIENT, x_grad),
            (_SCALE_GRADIENT, channels),
            (_SHIFT_GRADIENT, channels),
        ],
    )


@lru_cache(_MAX_PRIMITIVES)
def convert(x: Layout, out: Layout) -> Primitive:
    """Return the kernel that converts to another dtype or layout. Operands: x, out."""
    library = _library()
    description = library.make(
        "reorder_primitive_desc", library.description(x), library.engine, library.description(out), library.engine, None
    )
    return Primitive(description, [(_SOURCE, x), (_TARGET, out)])
