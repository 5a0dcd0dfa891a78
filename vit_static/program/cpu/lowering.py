"""A compiled program's expensive operators, put on oneDNN's kernels: what a CPU's training step is made of.

`lower` takes a program as one rank executes it, forward, backward and update, and puts operators of ours in the place
of Paddle's for products, attention, GELU, softmax, LayerNorm and the gradients of what is broadcast, such as biases.
What stands between those costs nothing any more: a transposition is read as other strides, a bias, a factor or a
residual is added while a product is written, and mixed precision's casts are what a kernel reads and writes.

It changes the program in steps that each leave it whole: gradients that only move values are written as moves; each
operator is replaced, looking back through casts and moves for its inputs, and ahead for what its readers can do with
(cpu_patterns.py); what nobody reads any more is removed.

In mixed precision what lies between products is bfloat16. Sums inside kernels, softmax's inputs, the residual stream,
LayerNorm's inputs and the gradients of parameters are float32.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from typing import Any

import paddle
from paddle import pir
from paddle.static import MetaTensor

from vit_static.program.cpu import onednn
from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.cpu.patterns import (
    CONVERT,
    MOVES,
    AttentionPattern,
    View,
    Writing,
    attention_around,
    dtype_of,
    inverse,
    is_over_first,
    is_over_last,
    is_read,
    may_be_low,
    num_broadcast_over,
    through_casts,
    view_of,
    whole,
    writings_of,
)
from vit_static.program.passes import BACKWARD, FORWARD, before, clone_before, role

# What is removed where nobody reads it.
_PURE = {
    *("pd_op.cast", "pd_op.scale", "pd_op.add", "pd_op.add_n", "pd_op.sum", "builtin.combine", *MOVES),
    *("pd_op.full", "pd_op.full_int_array"),
    *(f"pd_op.{name}{grad}" for grad in ("", "_grad") for name in ("matmul", "gelu", "softmax", "layer_norm")),
    *(f"pd_op.{name}_grad" for name in ("add", "reshape", "flatten", "transpose")),
}


def lower(program: Any) -> None:
    """Puts a program's expensive operators on oneDNN's kernels."""
    with paddle.static.program_guard(program):
        _simplify(program)
        _compute_gelu_again(program)
        _Lowering().fuse_attention(program)
        _remove_unread(program)
        _Lowering().lower_each(program)
        _remove_unread(program)


# -- operators of ours -----------------------------------------------------------------------------------------------

_names: dict[Hashable, str] = {}
_one_at_a_time = threading.Lock()


def has_operators() -> bool:
    """Whether this process has any: Paddle Inference 3.3.1, which takes them for custom operators that it has to make
    known, then ends the process when it opens a program."""
    return bool(_names)


def _operator(
    kernel: str, key: Hashable, run: Callable[..., None], inputs: list[Any], outputs: list[tuple[str, tuple[int, ...]]]
) -> list[Any]:
    """Adds an operator: `run` gets the addresses of its inputs and outputs, and fills the latter, given by dtype and
    shape.

    Paddle knows an operator's function by its name: `key` says which are the same.
    """

    def call(*tensors: paddle.Tensor) -> Any:
        with paddle.base.dygraph.base.guard():
            made = [paddle.empty(shape, dtype) for dtype, shape in outputs]
            with _one_at_a_time:  # kernels keep their operands' addresses, and share memory to work in
                run(*(tensor.data_ptr() for tensor in (*tensors, *made)))
        return made[0] if len(made) == 1 else tuple(made)

    def infer(*_: Any) -> Any:
        metas = [MetaTensor(shape=list(shape), dtype=getattr(paddle, dtype)) for dtype, shape in outputs]
        return metas[0] if len(metas) == 1 else tuple(metas)

    name = _names.setdefault((kernel, key, tuple(outputs)), f"vit_static_{kernel}_{len(_names)}")
    return list(
        paddle._C_ops._run_python_op(
            *inputs,
            name=name,
            input_names=[f"in{index}" for index in range(len(inputs))],
            output_names=[f"out{index}" for index in range(len(outputs))],
            attrs={"infer_meta_fn_ptr": infer, "fn_ptr": call},
            inplace_map={},
        )
    )


def _convert(value: Any, dtype: str) -> Any:
    """The value in another dtype."""
    length = math.prod(value.shape)
    primitive = onednn.convert(dense(dtype_of(value), length), dense(dtype, length))
    (converted,) = _operator("convert", primitive, primitive, [value], [(dtype, tuple(value.shape))])
    return converted


def _stand_in(result: Any, value: Any) -> None:
    """Has those who read `result` read `value`, in the dtype that they expect; the next operators look through that."""
    dtype = dtype_of(result)
    result.replace_all_uses_with(value if dtype_of(value) == dtype else _convert(value, dtype))


@cache
def _ones(dtype: str, length: int) -> paddle.Tensor:
    return paddle.ones([length], dtype)


# -- the steps -------------------------------------------------------------------------------------------------------


def _simplify(program: Any) -> None:
    """Writes gradients of moves as moves, and those of additions as what they are: the same value, or a sum of it over
    the dimensions of a broadcast. So what they read for its shape alone is in nobody's way."""
    for operation in list(program.global_block().ops):
        name = operation.name()
        if name in ("pd_op.reshape_grad", "pd_op.flatten_grad"):
            with before(operation):
                moved = paddle.reshape(operation.operand_source(1), operation.operand_source(0).shape)
            operation.result(0).replace_all_uses_with(moved)
        elif name == "pd_op.transpose_grad":
            with before(operation):
                moved = paddle.transpose(operation.operand_source(0), inverse(operation.attrs()["perm"]))
            operation.result(0).replace_all_uses_with(moved)
        elif name == "pd_op.add_grad":
            _simplify_add_grad(operation)
        elif name == "pd_op.add_n":
            _add_products_one_by_one(operation)
    _remove_unread(program)


def _simplify_add_grad(operation: Any) -> None:
    gradient = operation.operand_source(2)
    for result in filter(is_read, operation.results()):
        if list(result.shape) == list(gradient.shape):
            result.replace_all_uses_with(gradient)
        elif (num_first := num_broadcast_over(result, gradient)) > 0:
            with before(operation):
                total = paddle.sum(gradient, axis=list(range(num_first)))
                result.replace_all_uses_with(paddle.reshape(total, result.shape))


def _add_products_one_by_one(add_n: Any) -> None:
    """Writes a sum so that each product among its terms can be added to the others as it is written."""
    combine = add_n.operand_source(0).get_defining_op()
    terms = [combine.operand_source(index) for index in range(combine.num_operands())]
    is_product = [through_casts(term).get_defining_op().name() == "pd_op.matmul_grad" for term in terms]
    products = [term for term, product in zip(terms, is_product, strict=True) if product]
    others = [term for term, product in zip(terms, is_product, strict=True) if not product]
    if not products or any(len(term.all_used_ops()) != 1 for term in products):
        return
    with before(add_n):
        total = paddle.add_n(others) if len(others) > 1 else [*others, *products][0]
        for product in products if others else products[1:]:
            total = paddle.add(total, product)
    add_n.result(0).replace_all_uses_with(total)


def _compute_gelu_again(program: Any) -> None:
    """Has the backward compute GELU from its input, which it keeps anyway, and not keep its output, as large: a
    quarter of what a block keeps, for a hundredth of a step's time."""
    operations = list(program.global_block().ops)
    for operation in operations:
        if operation.name() != "pd_op.gelu" or operation.op_role != FORWARD:
            continue
        casts = [reader for reader in operation.result(0).all_used_ops() if reader.name() == "pd_op.cast"]
        for chain in ([operation], *([operation, cast] for cast in casts)):
            value = chain[-1].result(0)
            readers = [reader for reader in value.all_used_ops() if reader.op_role == BACKWARD]
            if readers:
                clone_before(chain, value, readers, operations)


def _remove_unread(program: Any) -> None:
    for operation in reversed(list(program.global_block().ops)):
        removable = operation.name() in _PURE or operation.name().startswith(CONVERT)
        if removable and not any(is_read(value) for value in operation.results()):
            operation.erase()


class _Lowering:
    """The replacing of operators."""

    def __init__(self) -> None:
        self._converted: dict[tuple[int, str], Any] = {}  # by a value's id, and the dtype

    def lower_each(self, program: Any) -> None:
        """Replaces operators one by one, in the program's order."""
        lowerings: dict[str, Callable[[Any], None]] = {
            "pd_op.matmul": self._matmul,
            "pd_op.matmul_grad": self._matmul_grad,
            "pd_op.sum": self._sum,
            "pd_op.gelu": self._gelu,
            "pd_op.gelu_grad": self._gelu_grad,
            "pd_op.softmax": self._softmax,
            "pd_op.softmax_grad": self._softmax_grad,
            "pd_op.layer_norm": self._layer_norm,
            "pd_op.layer_norm_grad": self._layer_norm_grad,
        }
        for operation in list(program.global_block().ops):
            lowering = lowerings.get(operation.name())
            if lowering is not None and dtype_of(operation.operand_source(0)):
                lowering(operation)

    # -- inputs and outputs ------------------------------------------------------------------------------------------

    def _as(self, dtype: str, view: View) -> View:
        """The same in another dtype, converted once for all where it was made."""
        if view.dtype == dtype:
            return view
        key = (view.base.id, dtype)
        if key not in self._converted:
            source = view.base.get_defining_op()
            pir.set_insertion_point_after(source)
            with role(max(source.op_role, 0)):
                self._converted[key] = _convert(view.base, dtype)
        return View(self._converted[key], replace(view.layout, dtype=dtype))

    def _rows(self, operation: Any, index: int, dtype: str | None = None) -> View:
        """An operand as a dense matrix, all dimensions but the last as one; in the dtype that it has, or in this."""
        value = operation.operand_source(index)
        view = view_of(value)
        if view.layout != dense(view.dtype, *view.layout.shape):
            view = whole(value)
        view = View(view.base, dense(view.dtype, math.prod(value.shape[:-1]), value.shape[-1]))
        return view if dtype is None else self._as(dtype, view)

    def _replace(self, operation: Any, kernel: str, primitive: Any, inputs: list[View], dtypes: list[str]) -> None:
        """Puts a kernel in an operator's place: its results, dense, in these dtypes."""
        outputs = [(dtype, tuple(value.shape)) for dtype, value in zip(dtypes, operation.results(), strict=True)]
        name = f"{kernel}_{inputs[0].dtype}"
        with before(operation):
            made = _operator(name, primitive, primitive, [view.base for view in inputs], outputs)
            for result, value in zip(operation.results(), made, strict=True):
                _stand_in(result, value)

    # -- attention ---------------------------------------------------------------------------------------------------

    def fuse_attention(self, program: Any) -> None:
        """Puts one operator in the place of scores, softmax and what it weighs, and one in their gradients' place."""
        for operation in list(program.global_block().ops):
            if operation.name() == "pd_op.softmax" and (found := attention_around(operation)) is not None:
                self._attention(found)
                if found.mix_grad is not None:
                    self._attention_grad(found)

    def _attention(self, found: AttentionPattern) -> None:
        dtype = dtype_of(found.scores.operand_source(0))
        operands = [(found.scores, 0), (found.scores, 1), (found.mix, 1)]
        inputs = [self._as(dtype, view_of(operation.operand_source(index))) for operation, index in operands]
        writing, layout = _written_alone(found.mix.result(0), found.mix.op_role, dtype)
        q, k, v = (view.layout for view in inputs)
        run = onednn.Attention(q, k, v, layout, writing.factor)
        with before(found.mix):
            made = [(layout.dtype, tuple(writing.value.shape))]
            bases = [view.base for view in inputs]
            (value,) = _operator(f"attention_{dtype}", (q, k, v, layout, writing.factor), run, bases, made)
            _stand_in(writing.value, value)

    def _attention_grad(self, found: AttentionPattern) -> None:
        dtype = dtype_of(found.scores.operand_source(0))
        operands = [(found.scores_grad, 0), (found.scores_grad, 1), (found.mix_grad, 1), (found.mix_grad, 2)]
        inputs = [self._as(dtype, view_of(operation.operand_source(index))) for operation, index in operands]
        results = [*found.scores_grad.results(), found.mix_grad.result(1)]
        written = [_written_alone(result, found.mix_grad.op_role, dtype) for result in results]
        given, made = [view.layout for view in inputs], [layout for _, layout in written]
        factors = tuple(writing.factor for writing, _ in written)
        with before(found.mix_grad):
            values = _operator(
                f"attention_backward_{dtype}",
                (*given, *made, factors),
                onednn.AttentionGrad(given, made, factors),
                [view.base for view in inputs],
                [(layout.dtype, tuple(writing.value.shape)) for writing, layout in written],
            )
            for (writing, _), value in zip(written, values, strict=True):
                _stand_in(writing.value, value)

    # -- products ----------------------------------------------------------------------------------------------------

    def _matmul(self, operation: Any) -> None:
        a, b = _factors(operation)
        a = self._folded(a, b, operation, 0)
        if _are_alike(a, b):
            self._product(operation, a, b, operation.result(0))

    def _matmul_grad(self, operation: Any) -> None:
        """Of out = a @ b, a's gradient is out's @ b^T, b's a^T @ out's; transposed where it was."""
        a, b = _factors(operation)
        gradient = view_of(operation.operand_source(2))
        a, gradient = self._folded(a, b, operation, 0), self._folded(gradient, b, operation, 2)
        if not (_are_alike(a, b) and _are_alike(gradient, b)):
            return
        of_a, of_b = operation.results()
        transposed_a, transposed_b = operation.attrs()["transpose_x"], operation.attrs()["transpose_y"]
        if is_read(of_a):
            factors = (b, gradient.transposed) if transposed_a else (gradient, b.transposed)
            self._product(operation, *factors, of_a)
        if is_read(of_b):
            factors = (gradient.transposed, a) if transposed_b else (a.transposed, gradient)
            self._product(operation, *factors, of_b)

    def _folded(self, view: View, b: View, operation: Any, index: int) -> View:
        """What is multiplied with a matrix as rows, its operand if its own strides don't allow that."""
        if len(b.layout.shape) != 2 or len(view.layout.shape) <= 2:
            return view
        is_transposed = index == 0 and operation.attrs()["transpose_x"]
        return view.as_rows if is_transposed or len(view.as_rows.layout.shape) == 2 else self._rows(operation, index)

    def _product(self, operation: Any, a: View, b: View, result: Any) -> None:
        """Makes `result`, and what its only readers make of it, by one product of `a` and `b`."""
        dtype = dtype_of(operation.operand_source(0))
        a, b = self._as(dtype, a), self._as(dtype, b)
        shape = (*a.layout.shape[:-1], b.layout.shape[-1])
        writing, layout = _written(result, operation.op_role, dtype, shape)
        inputs, bias, added = [a.base, b.base], None, None
        if writing.bias is not None:
            bias = dense("float32", *(1 for _ in shape[:-1]), shape[-1])
            inputs.append(writing.bias)
        if writing.added is not None:
            added = dense("float32", *shape)
            inputs.append(writing.added)
        primitive = onednn.matmul(a.layout, b.layout, layout, bias, added, writing.factor)
        with before(writing.value.get_defining_op()):
            made = [(layout.dtype, tuple(writing.value.shape))]
            (value,) = _operator(f"matmul_{dtype}", primitive, primitive, inputs, made)
            _stand_in(writing.value, value)

    def _sum(self, operation: Any) -> None:
        """Over the first dimensions, such as a bias's gradient: a product with ones."""
        result = operation.result(0)
        if not is_over_first(operation) or dtype_of(result) != "float32":
            return
        view = self._rows(operation, 0)
        dtype, columns = view.dtype, math.prod(result.shape)
        length = math.prod(view.layout.shape) // columns
        primitive = onednn.matmul(dense(dtype, 1, length), dense(dtype, length, columns), dense("float32", 1, columns))

        def run(address: int, out: int) -> None:
            primitive(_ones(dtype, length).data_ptr(), address, out)

        with before(operation):
            made = [("float32", tuple(result.shape))]
            (value,) = _operator(f"column_sum_{dtype}", primitive, run, [view.base], made)
        result.replace_all_uses_with(value)

    # -- element by element, and row by row --------------------------------------------------------------------------

    def _gelu(self, operation: Any) -> None:
        x = self._rows(operation, 0)
        primitive = onednn.gelu(x.layout, x.layout, operation.attrs()["approximate"])
        self._replace(operation, "gelu", primitive, [x], [x.dtype])

    def _gelu_grad(self, operation: Any) -> None:
        x = self._rows(operation, 0)
        gradient = self._rows(operation, 1, x.dtype)
        primitive = onednn.gelu_grad(x.layout, gradient.layout, x.layout, operation.attrs()["approximate"])
        self._replace(operation, "gelu_backward", primitive, [x, gradient], [x.dtype])

    def _softmax(self, operation: Any) -> None:
        if is_over_last(operation.attrs()["axis"], operation.result(0)):
            x = self._rows(operation, 0)
            dtype = "bfloat16" if may_be_low(operation.result(0)) else "float32"
            self._replace(operation, "softmax", onednn.softmax(x.layout, replace(x.layout, dtype=dtype)), [x], [dtype])

    def _softmax_grad(self, operation: Any) -> None:
        if is_over_last(operation.attrs()["axis"], operation.result(0)):
            out = self._rows(operation, 0)
            gradient = self._rows(operation, 1, out.dtype)
            primitive = onednn.softmax_grad(out.layout, gradient.layout, out.layout)
            self._replace(operation, "softmax_backward", primitive, [out, gradient], [out.dtype])

    def _layer_norm(self, operation: Any) -> None:
        attributes = operation.attrs()
        if is_over_last(attributes["begin_norm_axis"], operation.operand_source(0)) and _has_operands(operation, 3):
            inputs = [self._rows(operation, index, "float32") for index in range(3)]
            layout = inputs[0].layout
            dtype = "bfloat16" if may_be_low(operation.result(0)) else "float32"
            primitive = onednn.layer_norm(layout, replace(layout, dtype=dtype), attributes["epsilon"])
            self._replace(operation, "layer_norm", primitive, inputs, [dtype, "float32", "float32"])

    def _layer_norm_grad(self, operation: Any) -> None:
        attributes = operation.attrs()
        if is_over_last(attributes["begin_norm_axis"], operation.operand_source(0)) and _has_operands(operation, 6):
            inputs = [self._rows(operation, index, "float32") for index in range(5)]
            gradient = self._rows(operation, 5)
            layout = inputs[0].layout
            primitive = onednn.layer_norm_grad(layout, gradient.layout, layout, attributes["epsilon"])
            self._replace(operation, "layer_norm_backward", primitive, [*inputs, gradient], ["float32"] * 3)


def _has_operands(operation: Any, number: int) -> bool:
    """Whether none is left out, as a scale may be."""
    return operation.num_operands() == number and all(
        operation.operand_source(index).initialized() for index in range(number)
    )


def _are_alike(a: View, b: View) -> bool:
    """Whether both are matrices, or stacks of as many: what is broadcast is left to Paddle."""
    return len(b.layout.shape) >= 2 and a.layout.shape[:-2] == b.layout.shape[:-2] and len(a.layout.shape) >= 2


def _factors(operation: Any) -> tuple[View, View]:
    """a and b of out = a @ b."""
    a, b = view_of(operation.operand_source(0)), view_of(operation.operand_source(1))
    attributes = operation.attrs()
    return a.transposed if attributes["transpose_x"] else a, b.transposed if attributes["transpose_y"] else b


def _written(
    result: Any, role_of_product: int, dtype: str, shape: tuple[int, ...], alone: bool = False
) -> tuple[Writing, Layout]:
    """The most that a product of `shape` can do before it writes, and where it writes to; `alone`: without anything
    that is added."""
    for writing in reversed(writings_of(result, role_of_product)):
        low = dtype == "bfloat16" and may_be_low(writing.value, is_asked_for=True)
        layout = writing.layout("bfloat16" if low else "float32", shape)
        if layout is not None and not (alone and (writing.bias is not None or writing.added is not None)):
            return writing, layout
    raise AssertionError("a product's own result can always be written")


def _written_alone(result: Any, role_of_product: int, dtype: str) -> tuple[Writing, Layout]:
    return _written(result, role_of_product, dtype, tuple(result.shape), alone=True)
