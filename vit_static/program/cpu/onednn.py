"""oneDNN's kernels, called directly: products, GELU, softmax, LayerNorm and conversions on CPUs.

Paddle's CPU wheel carries oneDNN (3.6), and calls it from operators of its own; but those convert layouts between each
other, sum a bias's gradient in a reference loop, and give wrong gradients of four-dimensional products (Paddle 3.3.1).
Here the same library is called through its C interface (oneapi-src/oneDNN, include/oneapi/dnnl/dnnl.h), with operands
where they lie: a transposed operand is one with other strides, not a copy.

An operand is an address and a `Layout`. A primitive is made once for its layouts, and kept.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_DATA_TYPES = {"float32": 3, "bfloat16": 2}
_BYTES = {"float32": 4, "bfloat16": 2}
_CPU, _IN_ORDER = 1, 1
_FORWARD_TRAINING, _BACKWARD = 64, 128
_GELU_ERF, _GELU_TANH, _LINEAR, _SOFTMAX, _ADD = 49, 43, 38, 196608, 131056
_SCALE_AND_SHIFT = 2 | 4
_MAX_DIMENSIONS = 12
# Numbers by which a primitive names its operands.
_SOURCE, _SOURCE_1, _TARGET, _WEIGHTS, _BIAS = 1, 2, 17, 33, 41
_MEAN, _VARIANCE, _SCALE, _SHIFT = 49, 50, 51, 52
_SOURCE_GRADIENT, _TARGET_GRADIENT, _SCALE_GRADIENT, _SHIFT_GRADIENT = 129, 145, 255, 256
_POST_OPERATION = 32768  # times 1 for the first of them, 2 for the second
_NUM_PRIMITIVES = 1024
_ALIGNMENT = 64
_SCORE_BYTES = 4 << 20  # of attention's scores at a time, so that they stay in the cores' caches


@dataclass(frozen=True)
class Layout:
    """How an operand lies in memory: dtype (float32 or bfloat16), shape, and strides in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def transposed(self) -> Layout:
        """The same memory with the last two dimensions exchanged."""
        (*outer, rows, columns), (*outer_strides, row, column) = self.shape, self.strides
        return Layout(self.dtype, (*outer, columns, rows), (*outer_strides, column, row))

    def permuted(self, order: Sequence[int]) -> Layout:
        """The same memory with its dimensions in another order."""
        return Layout(
            self.dtype, tuple(self.shape[axis] for axis in order), tuple(self.strides[axis] for axis in order)
        )

    def reshaped(self, shape: Sequence[int]) -> Layout | None:
        """The same memory in another shape; None where its strides don't allow that."""
        like = np.lib.stride_tricks.as_strided(np.empty(1, np.int8), self.shape, self.strides)
        try:
            reshaped = np.reshape(like, shape, copy=False)
        except ValueError:
            return None
        return Layout(self.dtype, reshaped.shape, reshaped.strides)

    def first(self, *lengths: int) -> Layout:
        """The first so many along each of the first dimensions."""
        return Layout(self.dtype, (*lengths, *self.shape[len(lengths) :]), self.strides)

    def offset(self, *place: int) -> int:
        """Bytes from the first element to that at a place along the first dimensions."""
        return _BYTES[self.dtype] * sum(index * stride for index, stride in zip(place, self.strides, strict=False))


def dense(dtype: str, *shape: int) -> Layout:
    """The layout of a tensor that lies row by row."""
    strides, length = [], 1
    for size in reversed(shape):
        strides.append(length)
        length *= size
    return Layout(dtype, shape, tuple(reversed(strides)))


class _Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Library:
    """The loaded library with one engine and one stream, which run what they are given at once, on OpenMP's threads."""

    def __init__(self) -> None:
        import paddle

        self._functions = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"))
        self.engine = self.make("engine", ctypes.c_int(_CPU), ctypes.c_size_t(0))
        self.stream = self.make("stream", self.engine, ctypes.c_uint(_IN_ORDER))

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._functions, f"dnnl_{name}")(*arguments)
        if status != 0:
            raise RuntimeError(f"oneDNN: dnnl_{name} failed with status {status}")

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call(f"{name}_create", ctypes.byref(made), *arguments)
        return made

    def description(self, layout: Layout) -> ctypes.c_void_p:
        """A memory descriptor."""
        # Strides of dimensions of length 1 mean nothing, but choose a kernel: with others than a dense tensor's a
        # product of [M, 1] and [1, N] writes nothing, without an error.
        strides, following = list(layout.strides), 1
        for axis in reversed(range(len(strides))):
            if layout.shape[axis] == 1:
                strides[axis] = following
            following = layout.shape[axis] * strides[axis]
        sizes = ctypes.c_int64 * _MAX_DIMENSIONS
        made = ctypes.c_void_p()
        self.call(
            "memory_desc_create_with_strides",
            ctypes.byref(made),
            ctypes.c_int(len(layout.shape)),
            sizes(*layout.shape),
            ctypes.c_int(_DATA_TYPES[layout.dtype]),
            sizes(*strides),
        )
        return made


@cache
def _library() -> _Library:
    return _Library()


class Primitive:
    """One kernel for given layouts; called with its operands' addresses, in the order of `operands`.

    `operands` are (number, layout), `description` is the primitive's. Holds on to nothing that it is called with.
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

    def __call__(self, *addresses: int) -> None:
        library = _library()
        for memory, address in zip(self._memories, addresses, strict=True):
            library.call("memory_set_data_handle", memory, ctypes.c_void_p(address))
        library.call("primitive_execute", self._primitive, library.stream, len(addresses), self._arguments)
        library.call("stream_wait", library.stream)


@lru_cache(_NUM_PRIMITIVES)
def matmul(
    a: Layout, b: Layout, out: Layout, bias: Layout | None = None, added: Layout | None = None, factor: float = 1.0
) -> Primitive:
    """out = (a @ b [+ bias]) * factor [+ added]. Operands a, b, those of bias and added that are there, out; all of as
    many dimensions, a bias with 1 where it is repeated."""
    library = _library()
    chain = library.make("post_ops")
    if factor != 1.0:
        library.call(
            "post_ops_append_eltwise", chain, ctypes.c_int(_LINEAR), ctypes.c_float(factor), ctypes.c_float(0.0)
        )
    if added is not None:
        library.call("post_ops_append_binary", chain, ctypes.c_int(_ADD), library.description(added))
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
    number_of_added = _POST_OPERATION * (2 if factor != 1.0 else 1) | _SOURCE_1
    operands = [(_SOURCE, a), (_WEIGHTS, b), (_BIAS, bias), (number_of_added, added), (_TARGET, out)]
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


@lru_cache(_NUM_PRIMITIVES)
def gelu(x: Layout, out: Layout, approximate: bool = False) -> Primitive:
    """By erf, or by its tanh approximation; operands x, out."""
    return Primitive(_gelu_forward(x, out, approximate), [(_SOURCE, x), (_TARGET, out)])


@lru_cache(_NUM_PRIMITIVES)
def gelu_grad(x: Layout, out_grad: Layout, x_grad: Layout, approximate: bool = False) -> Primitive:
    """Operands x, out_grad, x_grad."""
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


@lru_cache(_NUM_PRIMITIVES)
def softmax(x: Layout, out: Layout) -> Primitive:
    """Over the last dimension; operands x, out, which may be the same memory."""
    return Primitive(_softmax_forward(x, out), [(_SOURCE, x), (_TARGET, out)])


@lru_cache(_NUM_PRIMITIVES)
def softmax_grad(out: Layout, out_grad: Layout, x_grad: Layout) -> Primitive:
    """Operands out, out_grad, x_grad; the last two may be the same memory."""
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


@lru_cache(_NUM_PRIMITIVES)
def layer_norm(x: Layout, out: Layout, epsilon: float) -> Primitive:
    """Over the last dimension; operands x, scale, shift, out, and the mean and variance that it writes."""
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


@lru_cache(_NUM_PRIMITIVES)
def layer_norm_grad(x: Layout, out_grad: Layout, x_grad: Layout, epsilon: float) -> Primitive:
    """Operands x, scale, shift, mean, variance, out_grad, x_grad, scale_grad, shift_grad."""
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


@lru_cache(_NUM_PRIMITIVES)
def convert(x: Layout, out: Layout) -> Primitive:
    """Into another dtype or layout; operands x, out."""
    library = _library()
    description = library.make(
        "reorder_primitive_desc", library.description(x), library.engine, library.description(out), library.engine, None
    )
    return Primitive(description, [(_SOURCE, x), (_TARGET, out)])


# -- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """softmax(q k^T) v, times a factor, of [B, H, N, d], a few images and heads at a time; called with the addresses of
    q, k, v and out.

    The scores are in float32, the weights in the operands' dtype. None of them outlives its part of the batch.
    """

    def __init__(self, q: Layout, k: Layout, v: Layout, out: Layout, factor: float = 1.0) -> None:
        self._operands = (q, k, v, out)
        self._tile = _Tile(q, k)
        q, k, v, out = (layout.first(*self._tile.lengths) for layout in self._operands)
        self._scores, self._weights = self._tile.score_kernels(q, k)
        self._mix = matmul(self._tile.weights, v, out, factor=factor)

    def __call__(self, *addresses: int) -> None:
        scores, weights, _ = self._tile.memory()
        for q, k, v, out in self._tile.places(self._operands, addresses):
            self._scores(q, k, scores)
            self._weights(scores, weights)
            self._mix(weights, v, out)


class AttentionGrad:
    """The gradients of `Attention`, its weights computed again; called with the addresses of q, k, v and out's
    gradient, then of what it writes: the gradients of q, k and v, each multiplied by a factor of its own."""

    def __init__(self, given: Sequence[Layout], grads: Sequence[Layout], factors: Sequence[float]) -> None:
        self._operands = (*given, *grads)
        self._tile = _Tile(given[0], given[1])
        q, k, v, out_grad, *grads = (layout.first(*self._tile.lengths) for layout in self._operands)
        weights = self._tile.weights
        self._scores, self._weights = self._tile.score_kernels(q, k)
        self._weights_grad = matmul(out_grad, v.transposed, weights)
        self._scores_grad = softmax_grad(weights, weights, weights)
        self._q_grad = matmul(weights, k, grads[0], factor=factors[0])
        self._k_grad = matmul(weights.transposed, q, grads[1], factor=factors[1])
        self._v_grad = matmul(weights.transposed, out_grad, grads[2], factor=factors[2])

    def __call__(self, *addresses: int) -> None:
        scores, weights, grad = self._tile.memory()
        for q, k, v, out_grad, q_grad, k_grad, v_grad in self._tile.places(self._operands, addresses):
            self._scores(q, k, scores)
            self._weights(scores, weights)
            self._v_grad(weights, out_grad, v_grad)
            self._weights_grad(out_grad, v, grad)
            self._scores_grad(weights, grad, grad)
            self._q_grad(grad, k, q_grad)
            self._k_grad(grad, q, k_grad)


class _Tile:
    """How many images and heads attention takes at a time, and its memory for them."""

    def __init__(self, q: Layout, k: Layout) -> None:
        images, heads, rows, _ = q.shape
        columns = k.shape[2]
        fitting = max(_SCORE_BYTES // (4 * rows * columns), 1)
        self._num = (images, heads)
        self.lengths = (_divisor(images, fitting // heads), _divisor(heads, fitting))
        self._scores = dense("float32", *self.lengths, rows, columns)
        self.weights = dense(q.dtype, *self.lengths, rows, columns)

    def score_kernels(self, q: Layout, k: Layout) -> tuple[Primitive, Primitive]:
        return matmul(q, k.transposed, self._scores), softmax(self._scores, self.weights)

    def memory(self) -> tuple[int, int, int]:
        """Addresses of the scores, the weights, and the gradients of either."""
        size = math.prod(self._scores.shape) * 4
        scores = _scratch(3 * size)
        return scores, scores if self.weights.dtype == "float32" else scores + size, scores + 2 * size

    def places(self, layouts: Sequence[Layout], addresses: Sequence[int]) -> Iterator[list[int]]:
        """The operands' addresses for one part of the batch after another."""
        for image in range(0, self._num[0], self.lengths[0]):
            for head in range(0, self._num[1], self.lengths[1]):
                yield [address + layout.offset(image, head) for layout, address in zip(layouts, addresses, strict=True)]


def _divisor(number: int, most: int) -> int:
    """The greatest divisor that is at most so much; 1 at least."""
    return max(divisor for divisor in range(1, max(most, 1) + 1) if number % divisor == 0)


_scratches: list[Any] = []


def _scratch(num_bytes: int) -> int:
    """The address of memory that whoever runs may use until it ends; the operators run one after another."""
    if not _scratches or len(_scratches[0]) < num_bytes + _ALIGNMENT:
        _scratches[:] = [ctypes.create_string_buffer(num_bytes + _ALIGNMENT)]
    address = ctypes.addressof(_scratches[0])
    return address + -address % _ALIGNMENT
