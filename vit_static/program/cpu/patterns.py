"""Patterns in a compiled program that a CPU kernel can replace: strided views, product epilogues, attention.

This module only inspects a program; lowering.py changes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import paddle

from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.ir import BACKWARD

CONVERT = "py_op.vit_static_convert"  # start of the names of our operators that only convert the dtype
_ATTENTION = "py_op.vit_static_attention"  # start of the names of our attention operators, which read one dtype
MOVES = ("pd_op.transpose", "pd_op.reshape", "pd_op.flatten")


def dtype_of(value: Any) -> str:
    """Return float32 or bfloat16, or an empty string for a dtype that no kernel supports."""
    return {paddle.float32: "float32", paddle.bfloat16: "bfloat16"}.get(value.dtype, "")


def is_cast(operation: Any) -> bool:
    """Return whether an operator converts between the dtypes that kernels support."""
    if operation.name().startswith(CONVERT):
        return True
    return operation.name() == "pd_op.cast" and bool(
        dtype_of(operation.operand_source(0)) and dtype_of(operation.result(0))
    )


def is_read(value: Any) -> bool:
    """Return whether an operator computes this result and another reads it."""
    return bool(value.initialized()) and not value.use_empty()


def inverse(order: Sequence[int]) -> list[int]:
    """Return the inverse permutation."""
    return [list(order).index(axis) for axis in range(len(order))]


# -- strided views ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A value as a strided view of a contiguous value, `base`."""

    base: Any
    layout: Layout

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    @property
    def transposed(self) -> View:
        return View(self.base, self.layout.transposed)

    @property
    def as_matrix(self) -> View:
        """All dimensions but the last as one; unchanged if the strides don't allow it."""
        layout = self.layout.reshaped((-1, self.layout.shape[-1]))
        return self if layout is None else View(self.base, layout)


def contiguous(value: Any) -> View:
    """Return a value as a view of itself."""
    return View(value, dense(dtype_of(value), *value.shape))


def view_of(value: Any) -> View:
    """Return a value as a view of the value from which casts and moves computed it."""
    operation = value.get_defining_op()
    name = operation.name()
    if is_cast(operation):
        return view_of(operation.operand_source(0))
    if name in MOVES and dtype_of(value):
        source = view_of(operation.operand_source(0))
        if name == "pd_op.transpose":
            return View(source.base, source.layout.permuted(operation.attrs()["perm"]))
        layout = source.layout.reshaped(value.shape)
        if layout is not None:
            return View(source.base, layout)
    return contiguous(value)


def through_casts(value: Any) -> Any:
    """Return the value before all casts that lead to `value`."""
    operation = value.get_defining_op()
    return through_casts(operation.operand_source(0)) if is_cast(operation) else value


def readers_of(value: Any) -> list[Any]:
    """Return the operators that read a value or a cast of it."""
    readers = []
    for reader in value.all_used_ops():
        readers.extend(readers_of(reader.result(0)) if is_cast(reader) else [reader])
    return readers


def is_read_backward(value: Any) -> bool:
    """Return whether an operator of the backward pass reads a value, moved or as it is."""
    return any(
        is_read_backward(reader.result(0)) if reader.name() in MOVES else reader.op_role == BACKWARD
        for reader in readers_of(value)
    )


def num_broadcast_dims(operand: Any, out: Any) -> int:
    """Return over how many first dimensions of `out` an operand was broadcast; 0 if also over others."""
    lengths = list(operand.shape)
    while lengths and lengths[0] == 1:
        lengths.pop(0)
    num_dims = len(out.shape) - len(lengths)
    return num_dims if lengths == list(out.shape)[num_dims:] else 0


def is_over_first(total: Any) -> bool:
    """Return whether a sum, an operator, is over some of the first dimensions and no others."""
    axes = total.operand_source(1).get_defining_op()
    if axes.name() != "pd_op.full_int_array":
        return False
    axes = list(axes.attrs()["value"])
    return 0 < len(axes) < len(total.operand_source(0).shape) and axes == list(range(len(axes)))


def is_over_last(axis: int, value: Any) -> bool:
    """Return whether an axis is the last dimension of a value."""
    return axis in (-1, len(value.shape) - 1)


# -- broadcast factors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broadcast:
    """Shapes of a product with a broadcast factor as one of matrices, in which the factor has one row or one column."""

    matrix: tuple[int, int]
    factor: tuple[int, int]
    expanded: tuple[int, ...]  # to which the factor is broadcast first


def match_broadcast(factor: Sequence[int], out: Sequence[int]) -> Broadcast | None:
    """Return how a product of `out`'s shape with a broadcast factor is computed; None if it is no such product.

    A factor that is broadcast over some of the first and of the inner dimensions, such as cosines [1, N, 1, d] of
    queries [B, N, H, d], is expanded to the inner ones.
    """
    lengths = [1] * (len(out) - len(factor)) + list(factor)
    broadcast = [axis for axis, (length, full) in enumerate(zip(lengths, out, strict=True)) if length != full]
    if not broadcast or math.prod(lengths) == 1:
        return None
    first = next(axis for axis, length in enumerate(lengths) if length != 1)  # it has one row, broadcast before here
    rows, columns = math.prod(out[:first]), math.prod(out[first:])
    if broadcast[0] < first:
        return Broadcast((rows, columns), (1, columns), (*(1 for _ in out[:first]), *out[first:]))
    last = broadcast[0]  # it has one column, broadcast from here on
    if any(length != 1 for length in lengths[last:]):
        return None
    rows = math.prod(out[:last])
    return Broadcast((rows, math.prod(out[last:])), (rows, 1), tuple(lengths))


# -- epilogues of matrix products ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epilogue:
    """The operations that a product applies to its result before writing it, and the value that it writes."""

    value: Any
    moves: tuple[Any, ...] = ()  # transpositions and reshapes, in order
    bias: Any = None
    factor: float = 1.0
    residual: Any = None

    def layout(self, dtype: str, shape: Sequence[int]) -> Layout | None:
        """Return the layout of a product of `shape` within the contiguous value that it writes; None if impossible."""
        layout: Layout | None = dense(dtype, *self.value.shape)
        for move in reversed(self.moves):
            if layout is None:
                return None
            if move.name() == "pd_op.transpose":
                layout = layout.permuted(inverse(move.attrs()["perm"]))
            else:
                layout = layout.reshaped(move.operand_source(0).shape)
        return None if layout is None else layout.reshaped(shape)


def epilogues_of(result: Any, role: int) -> list[Epilogue]:
    """Return the possible epilogues of a product with this role, from none to the longest.

    Each one adds what the only reader of the value before does with it.
    """
    epilogues = [Epilogue(result)]
    while (longer := _with_only_reader(epilogues[-1], role)) is not None:
        epilogues.append(longer)
    return epilogues


def _with_only_reader(epilogue: Epilogue, role: int) -> Epilogue | None:
    value, readers = epilogue.value, epilogue.value.all_used_ops()
    if len(readers) != 1 or readers[0].op_role != role or epilogue.residual is not None:
        return None
    (reader,) = readers
    name = reader.name()
    longer = replace(epilogue, value=reader.result(0)) if reader.num_results() == 1 else epilogue
    if is_cast(reader):
        return longer
    if name in MOVES:
        return replace(longer, moves=(*epilogue.moves, reader))
    if name == "pd_op.scale":
        factor = reader.operand_source(1).get_defining_op()
        if factor.name() == "pd_op.full" and reader.attrs()["bias"] == 0.0:
            return replace(longer, factor=epilogue.factor * factor.attrs()["value"])
    if name == "pd_op.add" and not epilogue.moves:
        first, second = reader.operand_source(0), reader.operand_source(1)
        other = second if first.is_same(value) else first
        if other.is_same(value) or dtype_of(other) != "float32":
            return None
        if list(other.shape) == [value.shape[-1]] and epilogue.bias is None and epilogue.factor == 1.0:
            return replace(longer, bias=other)
        if list(other.shape) == list(value.shape):
            return replace(longer, residual=other)
    return None


def can_be_bfloat16(value: Any, is_requested: bool = False) -> bool:
    """Return whether all readers of a value accept bfloat16, and one requests it."""
    is_requested, is_accepted = _readers_bfloat16(value, is_requested)
    return is_requested and is_accepted


def _readers_bfloat16(value: Any, is_requested: bool) -> tuple[bool, bool]:
    """Return whether a reader of the value requests bfloat16, and whether all accept it."""
    is_low, is_accepted = dtype_of(value) == "bfloat16", True
    for reader in value.all_used_ops():
        name = reader.name()
        if is_cast(reader) and dtype_of(reader.result(0)) == "bfloat16":
            is_requested = True
        elif name in ("pd_op.matmul", "pd_op.matmul_grad"):
            is_accepted = is_accepted and is_low
        elif name in MOVES or is_cast(reader):
            is_requested, do_accept = _readers_bfloat16(reader.result(0), is_requested)
            is_accepted = is_accepted and do_accept
        elif name.startswith(_ATTENTION):
            is_accepted = is_accepted and is_low
        elif name == "pd_op.layer_norm_grad":
            is_accepted = is_accepted and reader.operand_source(reader.num_operands() - 1).is_same(value)
        elif name == "pd_op.sum":
            is_accepted = is_accepted and is_over_first(reader)
        else:
            is_accepted = is_accepted and name in ("pd_op.gelu", "pd_op.gelu_grad", "pd_op.softmax_grad")
    return is_requested or is_low, is_accepted


# -- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionPattern:
    """The products of one attention: q @ k^T and weights @ v, and their gradients if the program has them."""

    scores: Any
    weighted_sum: Any
    scores_grad: Any = None
    weighted_sum_grad: Any = None


def match_attention(softmax: Any) -> AttentionPattern | None:
    """Return the attention that a softmax is part of.

    None if it belongs to none, or if another operator, such as dropout, lies in between.
    """
    scores, weights = through_casts(softmax.operand_source(0)), softmax.result(0)
    product = scores.get_defining_op()
    if not is_over_last(softmax.attrs()["axis"], weights):
        return None
    if product.name() != "pd_op.matmul" or len(scores.shape) != 4 or len(readers_of(scores)) != 1:
        return None
    if product.attrs()["transpose_x"] or not product.attrs()["transpose_y"]:
        return None
    readers = {reader.name(): reader for reader in readers_of(weights)}
    weighted_sum = readers.pop("pd_op.matmul", None)
    if weighted_sum is None or not _multiplies(weighted_sum, weights) or len(readers) + 1 != len(readers_of(weights)):
        return None
    if not readers:
        return AttentionPattern(product, weighted_sum)
    if set(readers) != {"pd_op.matmul_grad", "pd_op.softmax_grad"}:
        return None
    weighted_sum_grad, softmax_grad = readers["pd_op.matmul_grad"], readers["pd_op.softmax_grad"]
    weights_grad_readers = [operation.id() for operation in readers_of(weighted_sum_grad.result(0))]
    if not _multiplies(weighted_sum_grad, weights) or weights_grad_readers != [softmax_grad.id()]:
        return None
    if not is_read(weighted_sum_grad.result(1)):  # frozen values
        return None
    after = readers_of(softmax_grad.result(0))
    if len(after) != 1 or after[0].name() != "pd_op.matmul_grad" or not all(map(is_read, after[0].results())):
        return None
    return AttentionPattern(product, weighted_sum, after[0], weighted_sum_grad)


def _multiplies(product: Any, left: Any) -> bool:
    """Return whether a product, or its gradient, has `left` as its left operand, and neither operand is transposed."""
    attributes = product.attrs()
    is_left = through_casts(product.operand_source(0)).is_same(left)
    return is_left and not attributes["transpose_x"] and not attributes["transpose_y"]
