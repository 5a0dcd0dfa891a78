"""The kernels of oneDNN that training uses: products, element-wise functions, softmax, LayerNorm and conversions.

Each function makes a primitive for its operands' layouts, once. The numbers below are enum values of the version that
onednn.py supports (include/oneapi/dnnl/dnnl_types.h).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

from vit_static.program.cpu.onednn import Layout, Primitive, dense, library

_FORWARD_TRAINING, _BACKWARD = 64, 128
_GELU_ERF, _GELU_TANH, _LINEAR, _LOGISTIC, _SWISH, _SOFTMAX = 49, 43, 38, 41, 44, 196608
_EXPONENTIAL = 42
_LOGISTIC_BY_RESULT = 260  # the gradient of the logistic function, computed from its result
_ADD, _MULTIPLY = 131056, 131057
_SCALE_AND_SHIFT = 2 | 4
# Numbers that identify a primitive's operands.
_SOURCE, _SOURCE_1, _TARGET, _WEIGHTS, _BIAS = 1, 2, 17, 33, 41
_MEAN, _VARIANCE, _SCALE, _SHIFT = 49, 50, 51, 52
_SOURCE_GRADIENT, _TARGET_GRADIENT, _SCALE_GRADIENT, _SHIFT_GRADIENT = 129, 145, 255, 256
_POST_OPERATION = 32768  # times 1 for the first post-operation, 2 for the second
MAX_PRIMITIVES = 1024  # cached, per kind


@lru_cache(MAX_PRIMITIVES)
def matmul(
    a: Layout,
    b: Layout,
    out: Layout,
    bias: Layout | None = None,
    residual: Layout | None = None,
    factor: float = 1.0,
    accumulate: bool = False,
) -> Primitive:
    """Return the kernel of out = (a @ b [+ bias]) * factor [+ residual], or of out += with `accumulate`.

    Operands: a, b, bias and residual if given, out. All have the same number of dimensions; the bias has length 1
    where it is broadcast. oneDNN 3.6 adds wrong values to `out` after another post-operation, so `accumulate` is alone.
    """
    assert not accumulate or (factor == 1.0 and residual is None)
    onednn = library()
    chain = onednn.make("post_ops")
    if factor != 1.0:
        onednn.call(
            "post_ops_append_eltwise", chain, ctypes.c_int(_LINEAR), ctypes.c_float(factor), ctypes.c_float(0.0)
        )
    if residual is not None:
        onednn.call("post_ops_append_binary", chain, ctypes.c_int(_ADD), onednn.description(residual))
    if accumulate:
        onednn.call("post_ops_append_sum", chain, ctypes.c_float(1.0), ctypes.c_int(0), ctypes.c_int(0))
    attributes = onednn.make("primitive_attr")
    onednn.call("primitive_attr_set_post_ops", attributes, chain)
    description = onednn.make(
        "matmul_primitive_desc",
        onednn.engine,
        onednn.description(a),
        onednn.description(b),
        None if bias is None else onednn.description(bias),
        onednn.description(out),
        attributes,
    )
    residual_number = _POST_OPERATION * (2 if factor != 1.0 else 1) | _SOURCE_1
    operands = [(_SOURCE, a), (_WEIGHTS, b), (_BIAS, bias), (residual_number, residual), (_TARGET, out)]
    return Primitive(description, [(number, layout) for number, layout in operands if layout is not None])


@lru_cache(MAX_PRIMITIVES)
def multiply(x: Layout, factor: Layout, out: Layout, addend: Layout | None = None) -> Primitive:
    """Return the kernel of out = x * factor [+ addend], for matrices; the factor may have length 1 in one dimension.

    Operands: x, factor, addend if given, out.
    """
    onednn = library()
    attributes = onednn.make("primitive_attr")
    if addend is not None:
        chain = onednn.make("post_ops")
        onednn.call("post_ops_append_binary", chain, ctypes.c_int(_ADD), onednn.description(addend))
        onednn.call("primitive_attr_set_post_ops", attributes, chain)
    description = onednn.make(
        "binary_primitive_desc",
        onednn.engine,
        ctypes.c_int(_MULTIPLY),
        onednn.description(x),
        onednn.description(factor),
        onednn.description(out),
        attributes,
    )
    operands = [(_SOURCE, x), (_SOURCE_1, factor), (_POST_OPERATION | _SOURCE_1, addend), (_TARGET, out)]
    return Primitive(description, [(number, layout) for number, layout in operands if layout is not None])


def _elementwise(kind: int, x: Layout, out: Layout, alpha: float = 0.0, beta: float = 0.0) -> ctypes.c_void_p:
    """Return the description of an element-wise function."""
    onednn = library()
    return onednn.make(
        "eltwise_forward_primitive_desc",
        onednn.engine,
        ctypes.c_int(_FORWARD_TRAINING),
        ctypes.c_int(kind),
        onednn.description(x),
        onednn.description(out),
        ctypes.c_float(alpha),
        ctypes.c_float(beta),
        None,
    )


def _elementwise_grad(kind: int, data: Layout, out_grad: Layout, x_grad: Layout, alpha: float = 0.0) -> ctypes.c_void_p:
    """Return the description of an element-wise function's gradient, which reads the function's input or result."""
    onednn = library()
    return onednn.make(
        "eltwise_backward_primitive_desc",
        onednn.engine,
        ctypes.c_int(kind),
        onednn.description(x_grad),
        onednn.description(out_grad),
        onednn.description(data),
        ctypes.c_float(alpha),
        ctypes.c_float(0.0),
        _elementwise(kind, data, data, alpha),
        None,
    )


def _gelu_kind(approximate: bool) -> int:
    return _GELU_TANH if approximate else _GELU_ERF


@lru_cache(MAX_PRIMITIVES)
def gelu(x: Layout, out: Layout, approximate: bool = False) -> Primitive:
    """Return the kernel of GELU, exact or by the tanh approximation. Operands: x, out."""
    return Primitive(_elementwise(_gelu_kind(approximate), x, out), [(_SOURCE, x), (_TARGET, out)])


@lru_cache(MAX_PRIMITIVES)
def gelu_grad(x: Layout, out_grad: Layout, x_grad: Layout, approximate: bool = False) -> Primitive:
    """Return the kernel of GELU's gradient. Operands: x, out_grad, x_grad."""
    description = _elementwise_grad(_gelu_kind(approximate), x, out_grad, x_grad)
    return Primitive(description, [(_SOURCE, x), (_TARGET_GRADIENT, out_grad), (_SOURCE_GRADIENT, x_grad)])


@lru_cache(MAX_PRIMITIVES)
def silu(x: Layout) -> Primitive:
    """Return the kernel of SiLU, x * sigmoid(x). Operands: x, out."""
    return Primitive(_elementwise(_SWISH, x, x, alpha=1.0), [(_SOURCE, x), (_TARGET, x)])


@lru_cache(MAX_PRIMITIVES)
def silu_grad(x: Layout) -> Primitive:
    """Return the kernel of SiLU's gradient. Operands: x, out_grad, x_grad; the last two may be the same memory."""
    description = _elementwise_grad(_SWISH, x, x, x, alpha=1.0)
    return Primitive(description, [(_SOURCE, x), (_TARGET_GRADIENT, x), (_SOURCE_GRADIENT, x)])


@lru_cache(MAX_PRIMITIVES)
def exponential(x: Layout) -> Primitive:
    """Return the kernel of exp. Operands: x, out, which may be the same memory."""
    return Primitive(_elementwise(_EXPONENTIAL, x, x), [(_SOURCE, x), (_TARGET, x)])


@lru_cache(MAX_PRIMITIVES)
def linear(x: Layout, factor: float, addend: float) -> Primitive:
    """Return the kernel of factor * x + addend. Operands: x, out, which may be the same memory."""
    return Primitive(_elementwise(_LINEAR, x, x, factor, addend), [(_SOURCE, x), (_TARGET, x)])


@lru_cache(MAX_PRIMITIVES)
def sigmoid(x: Layout) -> Primitive:
    """Return the kernel of the logistic function. Operands: x, out."""
    return Primitive(_elementwise(_LOGISTIC, x, x), [(_SOURCE, x), (_TARGET, x)])


@lru_cache(MAX_PRIMITIVES)
def sigmoid_grad(out: Layout) -> Primitive:
    """Return the kernel of the logistic function's gradient. Operands: out, out_grad, x_grad."""
    description = _elementwise_grad(_LOGISTIC_BY_RESULT, out, out, out)
    return Primitive(description, [(_TARGET, out), (_TARGET_GRADIENT, out), (_SOURCE_GRADIENT, out)])


def _softmax_forward(x: Layout, out: Layout) -> ctypes.c_void_p:
    onednn = library()
    return onednn.make(
        "softmax_forward_primitive_desc",
        onednn.engine,
        ctypes.c_int(_FORWARD_TRAINING),
        ctypes.c_int(_SOFTMAX),
        onednn.description(x),
        onednn.description(out),
        ctypes.c_int(len(x.shape) - 1),
        None,
    )


@lru_cache(MAX_PRIMITIVES)
def softmax(x: Layout, out: Layout) -> Primitive:
    """Return the kernel of softmax over the last dimension. Operands: x, out, which may be the same memory."""
    return Primitive(_softmax_forward(x, out), [(_SOURCE, x), (_TARGET, out)])


@lru_cache(MAX_PRIMITIVES)
def softmax_grad(out: Layout, out_grad: Layout, x_grad: Layout) -> Primitive:
    """Return the kernel of softmax's gradient. Operands: out, out_grad, x_grad; the last two may be the same memory."""
    onednn = library()
    description = onednn.make(
        "softmax_backward_primitive_desc",
        onednn.engine,
        ctypes.c_int(_SOFTMAX),
        onednn.description(x_grad),
        onednn.description(out_grad),
        onednn.description(out),
        ctypes.c_int(len(out.shape) - 1),
        _softmax_forward(x_grad, out),
        None,
    )
    return Primitive(description, [(_TARGET, out), (_TARGET_GRADIENT, out_grad), (_SOURCE_GRADIENT, x_grad)])


def _layer_norm_forward(x: Layout, out: Layout, statistics: Layout, epsilon: float) -> ctypes.c_void_p:
    onednn = library()
    return onednn.make(
        "layer_normalization_forward_primitive_desc",
        onednn.engine,
        ctypes.c_int(_FORWARD_TRAINING),
        onednn.description(x),
        onednn.description(out),
        onednn.description(statistics),
        ctypes.c_float(epsilon),
        ctypes.c_uint(_SCALE_AND_SHIFT),
        None,
    )


@lru_cache(MAX_PRIMITIVES)
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


@lru_cache(MAX_PRIMITIVES)
def layer_norm_grad(x: Layout, out_grad: Layout, x_grad: Layout, epsilon: float) -> Primitive:
    """Return the kernel of LayerNorm's gradients.

    Operands: x, scale, shift, mean, variance, out_grad, x_grad, scale_grad, shift_grad; it writes the last three.
    """
    onednn = library()
    statistics, channels = dense("float32", *x.shape[:-1]), dense("float32", x.shape[-1])
    description = onednn.make(
        "layer_normalization_backward_primitive_desc",
        onednn.engine,
        ctypes.c_int(_BACKWARD),
        onednn.description(x_grad),
        onednn.description(out_grad),
        onednn.description(x),
        onednn.description(statistics),
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


@lru_cache(MAX_PRIMITIVES)
def convert(x: Layout, out: Layout) -> Primitive:
    """Return the kernel that converts to another dtype or layout. Operands: x, out."""
    onednn = library()
    description = onednn.make(
        "reorder_primitive_desc", onednn.description(x), onednn.engine, onednn.description(out), onednn.engine, None
    )
    return Primitive(description, [(_SOURCE, x), (_TARGET, out)])
