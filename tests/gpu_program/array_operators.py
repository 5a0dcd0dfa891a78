"""Operators of compiled programs on arrays: constants, shapes, element-wise arithmetic, reductions.

operators.py explains how an operator is written. In this file every operator follows NumPy's function of the same name,
if there is one; the docstrings say what differs. `*_grad` operators return one gradient per input of their operator,
summed over the axes along which that input was broadcast. An attribute `dtype` only repeats that of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Arrays = Sequence[Array]


# Constants


def full(*, shape: list[int], value: float, dtype: Any) -> Array:
    return np.full(shape, value)


def full_int_array(*, value: list[int], dtype: Any) -> Array:
    return np.array(value, np.int64)


def full_like(x: Array, value: Array, *, dtype: Any) -> Array:
    """Return an array of the shape of `x`. value [1]."""
    return np.full(x.shape, value.item())


def arange(start: Array, end: Array, step: Array, *, dtype: Any) -> Array:
    return np.arange(start.item(), end.item(), step.item())


def one_hot(x: Array, num_classes: Array) -> Array:
    """Return 1 at the index in `x` [...] and 0 elsewhere, [..., num_classes]."""
    return x[..., np.newaxis] == np.arange(num_classes.item())


# Copies and shapes. The executor computes each of them into new memory.


def copy(x: Array, *, dtype: Any = None) -> Array:
    """Return `x`, which the interpreter converts to the result's dtype: assign and cast."""
    return x.copy()


def assign_out(x: Array, out: Array) -> Array:
    """Return `x` as the new content of `out`."""
    return x.copy()


def set_value(
    x: Array,
    values: Array,
    starts: Array,
    ends: Array,
    steps: Array,
    *,
    axes: list[int],
    decrease_axes: list[int],
    none_axes: list[int],
) -> Array:
    """Return x with every element set to `values`, broadcast. Setting a slice isn't needed."""
    assert not axes and not decrease_axes and not none_axes, "a slice"
    return np.broadcast_to(values, x.shape).copy()


def reshape(x: Array, shape: Array) -> Array:
    """Return x in another shape. A length of 0 is that of x at the same position, and -1 the remaining length."""
    lengths = [x.shape[axis] if length == 0 else int(length) for axis, length in enumerate(shape)]
    return x.reshape(lengths).copy()


def reshape_like(x: Array, grad: Array) -> Array:
    """Return the gradient in the shape of the operator's input `x`: reshape, flatten, unsqueeze, squeeze."""
    return grad.reshape(x.shape).copy()


def flatten(x: Array, *, start_axis: int, stop_axis: int) -> Array:
    """Merge the axes from `start_axis` to `stop_axis`, inclusive."""
    return x.reshape([*x.shape[:start_axis], -1, *x.shape[stop_axis + 1 :]]).copy()


def unsqueeze(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(axes.tolist())).copy()


def expand(x: Array, shape: Array) -> Array:
    """Broadcast to a shape, in which -1 keeps the length of x."""
    offset = len(shape) - x.ndim
    lengths = [x.shape[axis - offset] if length == -1 else int(length) for axis, length in enumerate(shape)]
    return np.broadcast_to(x, lengths).copy()


def transpose(x: Array, *, perm: list[int]) -> Array:
    return x.transpose(perm).copy()


def transpose_grad(grad: Array, *, perm: list[int]) -> Array:
    return grad.transpose(np.argsort(perm)).copy()


def _slices(ndim: int, axes: list[int], starts: Array, ends: Array) -> tuple[slice, ...]:
    slices = [slice(None)] * ndim
    for axis, start, end in zip(axes, starts.tolist(), ends.tolist(), strict=True):
        slices[axis] = slice(start, end)
    return tuple(slices)


def slice_array(
    x: Array, starts: Array, ends: Array, *, axes: list[int], infer_flags: list[int], decrease_axis: list[int]
) -> Array:
    """Take x[start:end] along each of `axes`, and then drop the axes `decrease_axis`, which have length 1.

    `infer_flags` say which starts and ends were known when the program was built.
    """
    part = x[_slices(x.ndim, axes, starts, ends)]
    return np.squeeze(part, tuple(decrease_axis)).copy() if decrease_axis else part.copy()


def slice_grad(
    x: Array,
    grad: Array,
    starts: Array,
    ends: Array,
    *,
    axes: list[int],
    infer_flags: list[int],
    decrease_axis: list[int],
) -> Array:
    """Return the gradient of `x`: 0 outside of the slice."""
    x_grad = np.zeros(x.shape, grad.dtype)
    x_grad[_slices(x.ndim, axes, starts, ends)] = np.expand_dims(grad, tuple(decrease_axis))
    return x_grad


def concat(xs: Arrays, axis: Array) -> Array:
    return np.concatenate(xs, axis.item())


def concat_grad(xs: Arrays, grad: Array, axis: Array) -> list[Array]:
    ends = np.cumsum([x.shape[axis.item()] for x in xs])[:-1]
    return [part.copy() for part in np.split(grad, ends, axis.item())]


def split(x: Array, sections: Array, axis: Array) -> list[Array]:
    """Split into parts of the lengths `sections`."""
    return [part.copy() for part in np.split(x, np.cumsum(sections)[:-1], axis.item())]


def split_with_num(x: Array, axis: Array, *, num: int) -> list[Array]:
    """Split into `num` equal parts."""
    return [part.copy() for part in np.split(x, num, axis.item())]


def stack(xs: Arrays, *, axis: int) -> Array:
    return np.stack(xs, axis)


def stack_grad(xs: Arrays, grad: Array, *, axis: int) -> list[Array]:
    return [part.copy() for part in np.moveaxis(grad, axis, 0)]


def take_along_axis(x: Array, index: Array, *, axis: int) -> Array:
    return np.take_along_axis(x, index, axis)


# Element-wise arithmetic


def scale(x: Array, factor: Array, *, bias: float, bias_after_scale: bool) -> Array:
    """Return x * factor + bias, or (x + bias) * factor. factor [1]."""
    return x * factor.item() + bias if bias_after_scale else (x + bias) * factor.item()


def add_n(xs: Arrays) -> Array:
    """Return the sum of arrays of one shape."""
    total = xs[0].copy()
    for x in xs[1:]:
        total = total + x
    return total


def sum_to(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an input of this shape was broadcast."""
    num_new = grad.ndim - len(shape)
    if num_new < 0:  # [1] and a scalar
        return grad.reshape(shape)
    stretched = tuple(num_new + axis for axis, length in enumerate(shape) if length == 1 != grad.shape[num_new + axis])
    return grad.sum((*range(num_new), *stretched), keepdims=True).reshape(shape)


def add_grad(x: Array, y: Array, grad: Array, *, axis: int) -> tuple[Array, Array]:
    _assert_numpy_broadcasting(axis)
    return sum_to(grad, x.shape).copy(), sum_to(grad, y.shape).copy()


def multiply_grad(x: Array, y: Array, grad: Array, *, axis: int) -> tuple[Array, Array]:
    _assert_numpy_broadcasting(axis)
    return sum_to(grad * y, x.shape), sum_to(grad * x, y.shape)


def _assert_numpy_broadcasting(axis: int) -> None:
    """Any other value aligns the inputs' shapes at this axis, as only Paddle's oldest operators do."""
    assert axis == -1, axis


def clip(x: Array, low: Array, high: Array) -> Array:
    """Limit x to the range from `low` [1] to `high` [1]."""
    return np.clip(x, low, high)


def rsqrt(x: Array) -> Array:
    return 1 / np.sqrt(x)


def tanh_grad(out: Array, grad: Array) -> Array:
    return grad * (1 - out * out)


# Reductions


def _axes(axes: Array) -> tuple[int, ...] | None:
    """Return the axes of a reduction; none means all."""
    return tuple(axes.tolist()) or None


def sum_over(x: Array, axes: Array, *, keepdim: bool, dtype: Any) -> Array:
    return np.asarray(x.sum(_axes(axes), keepdims=keepdim))


def mean(x: Array, axes: Array, *, keepdim: bool) -> Array:
    return np.asarray(x.mean(_axes(axes), keepdims=keepdim))


def max_over(x: Array, axes: Array, *, keepdim: bool) -> Array:
    return np.asarray(x.max(_axes(axes), keepdims=keepdim))


def argmax(x: Array, axis: Array, *, keepdims: bool, flatten: bool, dtype: Any) -> Array:
    return np.argmax(x, None if flatten else axis.item(), keepdims=keepdims)


def sum_grad(x: Array, grad: Array, axes: Array, *, keepdim: bool, reduce_all: bool) -> Array:
    """Return the gradient of `x`, the same for all elements that were added."""
    reduced = _axes(axes)
    if reduced is None or reduce_all:
        grad = grad.reshape([1] * x.ndim)
    elif not keepdim:
        grad = np.expand_dims(grad, reduced)
    return np.broadcast_to(grad, x.shape).copy()


def mean_grad(x: Array, grad: Array, axes: Array, *, keepdim: bool, reduce_all: bool) -> Array:
    num_reduced = x.size // max(grad.size, 1)
    return sum_grad(x, grad, axes, keepdim=keepdim, reduce_all=reduce_all) / np.float32(num_reduced)


def squared_l2_norm(x: Array) -> Array:
    """Return the sum of the squares, [1]."""
    return np.sum(np.square(x)).reshape([1])
