"""What may be put together in a compiled program for a CPU: this looks at it, cpu_kernels.py changes it.

Where a value lies, seen through the casts and moves that made it; what a product may do on its way to memory; which
values may be bfloat16; what belongs to one attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import paddle

from vit_static.program.cpu.onednn import Layout, dense

CONVERT = "py_op.vit_static_convert"  # of our operators' names, that which changes nothing but the dtype
ATTENTION = "py_op.vit_static_attention"  # those of attention, which takes the products' dtype
MOVES = ("pd_op.transpose", "pd_op.reshape", "pd_op.flatten")


def dtype_of(value: Any) -> str:
    """float32 or bfloat16; empty for what no kernel takes."""
    return {paddle.float32: "float32", paddle.bfloat16: "bfloat16"}.get(value.dtype, "")


def is_cast(operation: Any) -> bool:
    """Between the dtypes that kernels take."""
    if operation.name().startswith(CONVERT):
        return True
    return operation.name() == "pd_op.cast" and bool(
        dtype_of(operation.operand_source(0)) and dtype_of(operation.result(0))
    )


def is_read(value: Any) -> bool:
    """Not so a result that an operator doesn't make, or that nobody needs."""
    return bool(value.initialized()) and not value.use_empty()


def inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(axis) for axis in range(len(order))]


# -- where values lie ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """Where a kernel finds a value: in a dense one's memory, in an order of its own."""

    base: Any
    layout: Layout

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    @property
    def transposed(self) -> View:
        return View(self.base, self.layout.transposed)

    @property
    def as_rows(self) -> View:
        """All dimensions but the last as one; as it is where its strides don't allow that."""
        layout = self.layout.reshaped((-1, self.layout.shape[-1]))
        return self if layout is None else View(self.base, layout)


def whole(value: Any) -> View:
    return View(value, dense(dtype_of(value), *value.shape))


def view_of(value: Any) -> View:
    """Where a value is to be had without the casts and moves that made it."""
    operation = value.get_defining_op()
    name = operation.name()
    if is_cast(operation):
        return view_of(operation.operand_source(0))
    if name in MOVES and dtype_of(value):
        moved = view_of(operation.operand_source(0))
        if name == "pd_op.transpose":
            return View(moved.base, moved.layout.permuted(operation.attrs()["perm"]))
        layout = moved.layout.reshaped(value.shape)
        if layout is not None:
            return View(moved.base, layout)
    return whole(value)


def through_casts(value: Any) -> Any:
    operation = value.get_defining_op()
    return through_casts(operation.operand_source(0)) if is_cast(operation) else value


def readers_of(value: Any) -> list[Any]:
    """The operators that read a value, or a cast of it."""
    readers = []
    for reader in value.all_used_ops():
        readers.extend(readers_of(reader.result(0)) if is_cast(reader) else [reader])
    return readers


def num_broadcast_over(part: Any, of: Any) -> int:
    """Over how many of the first dimensions of the other `part` was repeated; 0 where it was over more than those."""
    lengths = list(part.shape)
    while lengths and lengths[0] == 1:
        lengths.pop(0)
    num_first = len(of.shape) - len(lengths)
    return num_first if lengths == list(of.shape)[num_first:] else 0


def is_over_first(total: Any) -> bool:
    """Whether a sum, an operator, is over some of the first dimensions and over no other."""
    axes = total.operand_source(1).get_defining_op()
    if axes.name() != "pd_op.full_int_array":
        return False
    axes = list(axes.attrs()["value"])
    return 0 < len(axes) < len(total.operand_source(0).shape) and axes == list(range(len(axes)))


def is_over_last(axis: int, value: Any) -> bool:
    return axis in (-1, len(value.shape) - 1)


# -- what a product writes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writing:
    """What a product does on its way to memory, and the value of the program that it has made then."""

    value: Any
    moves: tuple[Any, ...] = ()  # transpositions and reshapes, in order
    bias: Any = None
    factor: float = 1.0
    added: Any = None

    def layout(self, dtype: str, shape: Sequence[int]) -> Layout | None:
        """How a product of `shape` lies in the dense value that it writes; None where it can't."""
        layout: Layout | None = dense(dtype, *self.value.shape)
        for move in reversed(self.moves):
            if layout is None:
                return None
            if move.name() == "pd_op.transpose":
                layout = layout.permuted(inverse(move.attrs()["perm"]))
            else:
                layout = layout.reshaped(move.operand_source(0).shape)
        return None if layout is None else layout.reshaped(shape)


def writings_of(result: Any, role: int) -> list[Writing]:
    """What a product of this role may do before it writes: nothing, or what its only reader does with it, or what that
    one's only reader does besides, and so on."""
    writings = [Writing(result)]
    while (longer := _with_only_reader(writings[-1], role)) is not None:
        writings.append(longer)
    return writings


def _with_only_reader(writing: Writing, role: int) -> Writing | None:
    value, readers = writing.value, writing.value.all_used_ops()
    if len(readers) != 1 or readers[0].op_role != role or writing.added is not None:
        return None
    (reader,) = readers
    name = reader.name()
    made = replace(writing, value=reader.result(0)) if reader.num_results() == 1 else writing
    if is_cast(reader):
        return made
    if name in MOVES:
        return replace(made, moves=(*writing.moves, reader))
    if name == "pd_op.scale":
        factor = reader.operand_source(1).get_defining_op()
        if factor.name() == "pd_op.full" and reader.attrs()["bias"] == 0.0:
            return replace(made, factor=writing.factor * factor.attrs()["value"])
    if name == "pd_op.add" and not writing.moves:
        first, second = reader.operand_source(0), reader.operand_source(1)
        other = second if first.is_same(value) else first
        if other.is_same(value) or dtype_of(other) != "float32":
            return None
        if list(other.shape) == [value.shape[-1]] and writing.bias is None and writing.factor == 1.0:
            return replace(made, bias=other)
        if list(other.shape) == list(value.shape):
            return replace(made, added=other)
    return None


def may_be_low(value: Any, is_asked_for: bool = False) -> bool:
    """Whether all who read a value can do with bfloat16, and one wants it."""
    is_asked_for, can_all = _what_readers_take(value, is_asked_for)
    return is_asked_for and can_all


def _what_readers_take(value: Any, is_asked_for: bool) -> tuple[bool, bool]:
    is_low, can_all = dtype_of(value) == "bfloat16", True
    for reader in value.all_used_ops():
        name = reader.name()
        if is_cast(reader) and dtype_of(reader.result(0)) == "bfloat16":
            is_asked_for = True
        elif name in ("pd_op.matmul", "pd_op.matmul_grad"):
            can_all = can_all and is_low
        elif name in MOVES or is_cast(reader):
            is_asked_for, can = _what_readers_take(reader.result(0), is_asked_for)
            can_all = can_all and can
        elif name.startswith(ATTENTION):
            can_all = can_all and is_low
        elif name == "pd_op.layer_norm_grad":
            can_all = can_all and reader.operand_source(reader.num_operands() - 1).is_same(value)
        elif name == "pd_op.sum":
            can_all = can_all and is_over_first(reader)
        else:
            can_all = can_all and name in ("pd_op.gelu", "pd_op.gelu_grad", "pd_op.softmax_grad")
    return is_asked_for or is_low, can_all


# -- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionPattern:
    """The operators of one attention: scores = q @ k^T, their softmax, mix = weights @ v; and the gradients' of the
    two products, where the program has any."""

    scores: Any
    mix: Any
    scores_grad: Any = None
    mix_grad: Any = None


def attention_around(softmax: Any) -> AttentionPattern | None:
    """The attention that a softmax is part of; None if it is of none, or something else stands in between, such as
    dropout."""
    scores, weights = through_casts(softmax.operand_source(0)), softmax.result(0)
    product = scores.get_defining_op()
    if not is_over_last(softmax.attrs()["axis"], weights):
        return None
    if product.name() != "pd_op.matmul" or len(scores.shape) != 4 or len(readers_of(scores)) != 1:
        return None
    if product.attrs()["transpose_x"] or not product.attrs()["transpose_y"]:
        return None
    readers = {reader.name(): reader for reader in readers_of(weights)}
    mix = readers.pop("pd_op.matmul", None)
    if mix is None or not _is_plain(mix, weights) or len(readers) + 1 != len(readers_of(weights)):
        return None
    if not readers:
        return AttentionPattern(product, mix)
    if set(readers) != {"pd_op.matmul_grad", "pd_op.softmax_grad"}:
        return None
    mix_grad, softmax_grad = readers["pd_op.matmul_grad"], readers["pd_op.softmax_grad"]
    if not _is_plain(mix_grad, weights) or [op.id() for op in readers_of(mix_grad.result(0))] != [softmax_grad.id()]:
        return None
    after = readers_of(softmax_grad.result(0))
    if len(after) != 1 or after[0].name() != "pd_op.matmul_grad" or not all(map(is_read, after[0].results())):
        return None
    return AttentionPattern(product, mix, after[0], mix_grad)


def _is_plain(product: Any, first: Any) -> bool:
    """Whether a product, or its gradient, is of `first` and another, neither transposed."""
    attributes = product.attrs()
    is_first = through_casts(product.operand_source(0)).is_same(first)
    return is_first and not attributes["transpose_x"] and not attributes["transpose_y"]
