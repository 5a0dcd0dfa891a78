"""Simplifications of a compiled program before and after its operators are replaced by oneDNN kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle

from vit_static.program.cpu.patterns import CONVERT, MOVES, inverse, is_read, num_broadcast_dims, through_casts
from vit_static.program.ir import BACKWARD, FORWARD, clone_for_backward, insert_before

# Operators without side effects, which are removed if nothing reads their results.
_ACTIVATIONS = ("gelu", "sigmoid", "silu", "swiglu", "softmax")
_PURE = {
    *("pd_op.cast", "pd_op.scale", "pd_op.add", "pd_op.add_n", "pd_op.sum", "builtin.combine", *MOVES),
    *("pd_op.full", "pd_op.full_int_array"),
    *(f"pd_op.{name}{grad}" for grad in ("", "_grad") for name in ("matmul", "multiply", "layer_norm", *_ACTIVATIONS)),
    *(f"pd_op.{name}_grad" for name in ("add", "reshape", "flatten", "transpose")),
}


def simplify_gradients(program: Any) -> None:
    """Replace the gradients of reshapes, transpositions and additions by what they compute.

    That is a reshape, a transposition, the same value, or its sum over broadcast dimensions. The gradient operators
    also read a forward value for its shape, which would keep it in memory.
    """
    for operation in list(program.global_block().ops):
        name = operation.name()
        if name in ("pd_op.reshape_grad", "pd_op.flatten_grad"):
            with insert_before(operation):
                gradient = paddle.reshape(operation.operand_source(1), operation.operand_source(0).shape)
            operation.result(0).replace_all_uses_with(gradient)
        elif name == "pd_op.transpose_grad":
            with insert_before(operation):
                gradient = paddle.transpose(operation.operand_source(0), inverse(operation.attrs()["perm"]))
            operation.result(0).replace_all_uses_with(gradient)
        elif name == "pd_op.add_grad":
            _simplify_add_grad(operation)
        elif name == "pd_op.multiply_grad":
            _simplify_multiply_grad(operation)
        elif name == "pd_op.add_n":
            _split_add_n(operation)
    remove_unread(program)


def _simplify_add_grad(operation: Any) -> None:
    gradient = operation.operand_source(2)
    for result in filter(is_read, operation.results()):
        if list(result.shape) == list(gradient.shape):
            result.replace_all_uses_with(gradient)
        elif (num_dims := num_broadcast_dims(result, gradient)) > 0:
            with insert_before(operation):
                total = paddle.sum(gradient, axis=list(range(num_dims)))
                result.replace_all_uses_with(paddle.reshape(total, result.shape))


def _simplify_multiply_grad(operation: Any) -> None:
    """Write the gradients of a float32 product as products, summed where a factor was broadcast.

    Paddle 3.3.1 sums those of a broadcast factor in a reference loop, a hundred times slower than its own sum.
    """
    factors, gradient = [operation.operand_source(0), operation.operand_source(1)], operation.operand_source(2)
    if any(value.dtype != paddle.float32 for value in (*factors, gradient)):
        return
    for result, factor, other in zip(operation.results(), factors, reversed(factors), strict=True):
        shape = list(factor.shape)
        axes = _broadcast_axes(shape, gradient.shape)
        if not is_read(result) or axes is None:
            continue
        with insert_before(operation):
            product = paddle.multiply(gradient, other)
            if axes:
                product = paddle.sum(product, axis=axes)
            if list(product.shape) != shape:
                product = paddle.reshape(product, shape)
        result.replace_all_uses_with(product)


def _broadcast_axes(shape: Sequence[int], out: Sequence[int]) -> list[int] | None:
    """Return the axes of `out` over which an operand of this shape was broadcast; None if shapes aren't known."""
    if min([*shape, *out], default=0) < 0:
        return None
    padded = [1] * (len(out) - len(shape)) + list(shape)
    return [axis for axis, (length, full) in enumerate(zip(padded, out, strict=True)) if length != full]


def _split_add_n(add_n: Any) -> None:
    """Write a sum as a chain, in which each matrix product among the terms can add the others as it is written."""
    combine = add_n.operand_source(0).get_defining_op()
    terms = [combine.operand_source(index) for index in range(combine.num_operands())]
    is_product = [through_casts(term).get_defining_op().name() == "pd_op.matmul_grad" for term in terms]
    products = [term for term, product in zip(terms, is_product, strict=True) if product]
    others = [term for term, product in zip(terms, is_product, strict=True) if not product]
    if not products or any(len(term.all_used_ops()) != 1 for term in products):
        return
    with insert_before(add_n):
        total = paddle.add_n(others) if len(others) > 1 else [*others, *products][0]
        for product in products if others else products[1:]:
            total = paddle.add(total, product)
    add_n.result(0).replace_all_uses_with(total)


def recompute_gelu(program: Any) -> None:
    """Recompute GELU in the backward pass from its input, which is kept anyway.

    Its output is as large: this saves a quarter of a block's activations, for a hundredth of a step's time.
    """
    operations = list(program.global_block().ops)
    for operation in operations:
        if operation.name() != "pd_op.gelu" or operation.op_role != FORWARD:
            continue
        casts = [reader for reader in operation.result(0).all_used_ops() if reader.name() == "pd_op.cast"]
        for chain in ([operation], *([operation, cast] for cast in casts)):
            value = chain[-1].result(0)
            readers = [reader for reader in value.all_used_ops() if reader.op_role == BACKWARD]
            if readers:
                clone_for_backward(chain, value, readers, operations)


def remove_unread(program: Any) -> None:
    """Remove operators without side effects whose results nothing reads."""
    for operation in reversed(list(program.global_block().ops)):
        is_pure = operation.name() in _PURE or operation.name().startswith(CONVERT)
        if is_pure and not any(is_read(value) for value in operation.results()):
            operation.erase()
