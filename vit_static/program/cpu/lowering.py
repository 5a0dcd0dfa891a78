"""Lowering of a compiled program's expensive operators to oneDNN kernels on a CPU.

`lower` takes a program as one rank executes it (forward, backward and update) and replaces Paddle's operators for
matrix products, attention, activations, softmax, LayerNorm, broadcast factors, and the gradients of broadcast
operands, such as biases. The operators in between become free: a transposition is read as other strides; a bias, a
factor or a residual is added while a product is written; mixed precision's casts are part of what a kernel reads and
writes.

The program stays valid after each step: gradients that only move values become moves (simplify.py); each operator is
replaced, looking back through casts and moves for its inputs, and ahead for what its readers do with the result
(patterns.py); operators that nothing reads any more are removed.

In mixed precision the values between products are bfloat16. Sums inside kernels, the inputs of softmax and LayerNorm,
the residual stream and the gradients of parameters are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import paddle
from paddle import pir

from vit_static.program.cpu import attention_float32, primitives, product_choice
from vit_static.program.cpu.attention import attention, attention_grad
from vit_static.program.cpu.column_sum import column_sum
from vit_static.program.cpu.custom_ops import add_op, convert, replace_result
from vit_static.program.cpu.gelu import gelu, gelu_grad
from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.cpu.patterns import (
    AttentionPattern,
    Epilogue,
    View,
    can_be_bfloat16,
    contiguous,
    dtype_of,
    epilogues_of,
    is_over_first,
    is_over_last,
    is_read,
    is_read_backward,
    match_attention,
    match_broadcast,
    view_of,
)
from vit_static.program.cpu.simplify import recompute_gelu, remove_unread, simplify_gradients
from vit_static.program.cpu.swiglu import swiglu, swiglu_grad
from vit_static.program.ir import insert_before, operator_role

_MIN_PRODUCT = 2**14  # elements; calling a kernel takes longer than a smaller product by Paddle's operator


def lower(program: Any, measures_products: bool = True) -> None:
    """Replace a program's expensive operators by oneDNN kernels. Changes the program.

    `measures_products`: let product_choice.py choose the library of products without an epilogue.
    """
    with paddle.static.program_guard(program):
        simplify_gradients(program)
        recompute_gelu(program)
        _Lowering(measures_products).fuse_attention(program)
        remove_unread(program)
        _Lowering(measures_products).lower_each(program)
        remove_unread(program)


class _Lowering:
    """Replaces the operators of one program. Conversions to another dtype are shared between them."""

    def __init__(self, measures_products: bool) -> None:
        self._measures_products = measures_products
        self._converted: dict[tuple[int, str], Any] = {}  # by value id and dtype
        self._expansions: dict[tuple[int, tuple[int, ...]], Any] = {}  # by value id and shape

    def lower_each(self, program: Any) -> None:
        """Replace operators one by one, in the program's order."""
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
            "pd_op.multiply": self._multiply,
            "pd_op.sigmoid": self._sigmoid,
            "pd_op.sigmoid_grad": self._sigmoid_grad,
            "pd_op.silu": self._silu,
            "pd_op.swiglu": self._swiglu,
            "pd_op.swiglu_grad": self._swiglu_grad,
        }
        for operation in list(program.global_block().ops):
            lowering = lowerings.get(operation.name())
            if lowering is not None and dtype_of(operation.operand_source(0)):
                lowering(operation)

    # -- inputs and outputs ------------------------------------------------------------------------------------------

    def _cast(self, view: View, dtype: str) -> View:
        """Return the view in another dtype. Its base is converted once, where it is computed."""
        if view.dtype == dtype:
            return view
        key = (view.base.id, dtype)
        if key not in self._converted:
            source = view.base.get_defining_op()
            pir.set_insertion_point_after(source)
            with operator_role(max(source.op_role, 0)):
                self._converted[key] = convert(view.base, dtype)
        return View(self._converted[key], replace(view.layout, dtype=dtype))

    def _as_matrix(self, operation: Any, index: int, dtype: str | None = None) -> View:
        """Return an operand as a contiguous matrix: all dimensions but the last as one. `dtype` None: its own."""
        value = operation.operand_source(index)
        view = view_of(value)
        if view.layout != dense(view.dtype, *view.layout.shape):
            view = contiguous(value)
        view = View(view.base, dense(view.dtype, math.prod(value.shape[:-1]), value.shape[-1]))
        return view if dtype is None else self._cast(view, dtype)

    def _replace(
        self,
        operation: Any,
        kernel: str,
        primitive: Any,
        inputs: list[View],
        dtypes: list[str],
        shapes: list[list[int]] | None = None,
    ) -> None:
        """Replace an operator by a kernel whose results are contiguous and have these dtypes.

        `shapes`: of the results, for an operator that may leave some out, as of frozen parameters' gradients.
        """
        shapes = [list(result.shape) for result in operation.results()] if shapes is None else shapes
        outputs = [(dtype, tuple(shape)) for dtype, shape in zip(dtypes, shapes, strict=True)]
        name = f"{kernel}_{inputs[0].dtype}"
        with insert_before(operation):
            values = add_op(name, primitive, primitive, [view.base for view in inputs], outputs)
            for result, value in zip(operation.results(), values, strict=True):
                if result.initialized():
                    replace_result(result, value)

    # -- attention ---------------------------------------------------------------------------------------------------

    def fuse_attention(self, program: Any) -> None:
        """Replace scores, softmax and weighted sum by one operator, and their gradients by another."""
        for operation in list(program.global_block().ops):
            if operation.name() == "pd_op.softmax" and (pattern := match_attention(operation)) is not None:
                out = self._attention(pattern)
                if pattern.weighted_sum_grad is not None:
                    self._attention_grad(pattern, out)

    def _attention(self, pattern: AttentionPattern) -> View | None:
        """Replace the forward operators. Return the result if the backward pass keeps it anyway."""
        dtype = dtype_of(pattern.scores.operand_source(0))
        operands = [(pattern.scores, 0), (pattern.scores, 1), (pattern.weighted_sum, 1)]
        inputs = [self._cast(view_of(operation.operand_source(index)), dtype) for operation, index in operands]
        epilogue, layout = _choose_factor_epilogue(pattern.weighted_sum.result(0), pattern.weighted_sum.op_role, dtype)
        q, k, v = (view.layout for view in inputs)
        run = attention(q, k, v, layout, epilogue.factor)
        with insert_before(pattern.weighted_sum):
            outputs = [(layout.dtype, tuple(epilogue.value.shape))]
            bases = [view.base for view in inputs]
            (value,) = add_op(f"attention_{dtype}", (q, k, v, layout, epilogue.factor), run, bases, outputs)
            replace_result(epilogue.value, value)
        return View(value, layout) if epilogue.factor == 1.0 and is_read_backward(value) else None

    def _attention_grad(self, pattern: AttentionPattern, out: View | None) -> None:
        scores_grad, weighted_sum_grad = pattern.scores_grad, pattern.weighted_sum_grad
        dtype = dtype_of(pattern.scores.operand_source(0))
        operands = [(scores_grad, 0), (scores_grad, 1), (weighted_sum_grad, 1), (weighted_sum_grad, 2)]
        inputs = [self._cast(view_of(operation.operand_source(index)), dtype) for operation, index in operands]
        results = [*scores_grad.results(), weighted_sum_grad.result(1)]
        epilogues = [_choose_factor_epilogue(result, weighted_sum_grad.op_role, dtype) for result in results]
        input_layouts, layouts = [view.layout for view in inputs], [layout for _, layout in epilogues]
        factors = tuple(epilogue.factor for epilogue, _ in epilogues)
        if out is not None and attention_float32.is_supported(input_layouts[0], input_layouts[3], out.layout):
            inputs.append(out)
            input_layouts.append(out.layout)
        with insert_before(weighted_sum_grad):
            values = add_op(
                f"attention_backward_{dtype}",
                (*input_layouts, *layouts, factors),
                attention_grad(input_layouts, layouts, factors),
                [view.base for view in inputs],
                [(layout.dtype, tuple(epilogue.value.shape)) for epilogue, layout in epilogues],
            )
            for (epilogue, _), value in zip(epilogues, values, strict=True):
                replace_result(epilogue.value, value)

    # -- matrix products ---------------------------------------------------------------------------------------------

    def _matmul(self, operation: Any) -> None:
        a, b = _matmul_operands(operation)
        a = self._flattened(a, b, operation, 0)
        if _have_same_batch(a, b):
            self._product(operation, a, b, operation.result(0))

    def _matmul_grad(self, operation: Any) -> None:
        """Lower the gradients of out = a @ b: out_grad @ b^T and a^T @ out_grad, transposed where the operand was."""
        a, b = _matmul_operands(operation)
        out_grad = view_of(operation.operand_source(2))
        a, out_grad = self._flattened(a, b, operation, 0), self._flattened(out_grad, b, operation, 2)
        if not (_have_same_batch(a, b) and _have_same_batch(out_grad, b)):
            return
        a_grad, b_grad = operation.results()
        transposed_a, transposed_b = operation.attrs()["transpose_x"], operation.attrs()["transpose_y"]
        if is_read(a_grad):
            factors = (b, out_grad.transposed) if transposed_a else (out_grad, b.transposed)
            self._product(operation, *factors, a_grad)
        if is_read(b_grad):
            factors = (out_grad.transposed, a) if transposed_b else (a.transposed, out_grad)
            self._product(operation, *factors, b_grad)

    def _flattened(self, view: View, b: View, operation: Any, index: int) -> View:
        """Return an operand that is multiplied by a matrix `b` as a matrix itself.

        Falls back to the contiguous operand if the view's strides don't allow it.
        """
        if len(b.layout.shape) != 2 or len(view.layout.shape) <= 2:
            return view
        flat = view.as_matrix
        is_transposed = index == 0 and operation.attrs()["transpose_x"]
        return flat if is_transposed or len(flat.layout.shape) == 2 else self._as_matrix(operation, index)

    def _product(self, operation: Any, a: View, b: View, result: Any) -> None:
        """Replace `result`, and what its only readers do with it, by one product of `a` and `b`."""
        dtype = dtype_of(operation.operand_source(0))
        a, b = self._cast(a, dtype), self._cast(b, dtype)
        shape = (*a.layout.shape[:-1], b.layout.shape[-1])
        epilogue, layout = _choose_epilogue(result, operation.op_role, dtype, shape)
        inputs, bias, residual = [a.base, b.base], None, None
        if epilogue.bias is not None:
            bias = dense("float32", *(1 for _ in shape[:-1]), shape[-1])
            inputs.append(epilogue.bias)
        if epilogue.residual is not None:
            residual = dense("float32", *shape)
            inputs.append(epilogue.residual)
        primitive: Any = primitives.matmul(a.layout, b.layout, layout, bias, residual, epilogue.factor)
        is_plain = bias is None and residual is None and dtype == "float32" and len(shape) == 2
        if is_plain and self._measures_products:
            primitive = product_choice.product(a.layout, b.layout, layout, epilogue.factor)
        with insert_before(epilogue.value.get_defining_op()):
            outputs = [(layout.dtype, tuple(epilogue.value.shape))]
            (value,) = add_op(f"matmul_{dtype}", primitive, primitive, inputs, outputs)
            replace_result(epilogue.value, value)

    def _sum(self, operation: Any) -> None:
        """Lower a sum over the first dimensions, such as a bias gradient, to a product with ones."""
        result = operation.result(0)
        if not is_over_first(operation) or dtype_of(result) != "float32":
            return
        view = self._as_matrix(operation, 0)
        dtype, num_columns = view.dtype, math.prod(result.shape)
        num_rows = math.prod(view.layout.shape) // num_columns
        run = column_sum(dense(dtype, num_rows, num_columns))
        with insert_before(operation):
            outputs = [("float32", tuple(result.shape))]
            (value,) = add_op(f"column_sum_{dtype}", run, run, [view.base], outputs)
        result.replace_all_uses_with(value)

    # -- element-wise and row-wise operators -------------------------------------------------------------------------

    def _gelu(self, operation: Any) -> None:
        x = self._as_matrix(operation, 0)
        self._replace(operation, "gelu", gelu(x.layout, operation.attrs()["approximate"]), [x], [x.dtype])

    def _gelu_grad(self, operation: Any) -> None:
        x = self._as_matrix(operation, 0)
        gradient = self._as_matrix(operation, 1, x.dtype)
        run = gelu_grad(x.layout, operation.attrs()["approximate"])
        self._replace(operation, "gelu_backward", run, [x, gradient], [x.dtype])

    def _sigmoid(self, operation: Any) -> None:
        x = self._as_matrix(operation, 0)
        if x.dtype == "float32":
            self._replace(operation, "sigmoid", primitives.sigmoid(x.layout), [x], [x.dtype])

    def _sigmoid_grad(self, operation: Any) -> None:
        out, gradient = self._as_matrix(operation, 0), self._as_matrix(operation, 1)
        if out.dtype == gradient.dtype == "float32":
            primitive = primitives.sigmoid_grad(out.layout)
            self._replace(operation, "sigmoid_backward", primitive, [out, gradient], [out.dtype])

    def _silu(self, operation: Any) -> None:
        x = self._as_matrix(operation, 0)
        if x.dtype == "float32":
            self._replace(operation, "silu", primitives.silu(x.layout), [x], [x.dtype])

    def _swiglu(self, operation: Any) -> None:
        gate, x = self._as_matrix(operation, 0), self._as_matrix(operation, 1)
        if gate.dtype == x.dtype == "float32":
            self._replace(operation, "swiglu", swiglu(gate.layout), [gate, x], [x.dtype])

    def _swiglu_grad(self, operation: Any) -> None:
        gate, x, gradient = (self._as_matrix(operation, index) for index in range(3))
        if gate.dtype == x.dtype == gradient.dtype == "float32":
            run = swiglu_grad(gate.layout)
            self._replace(operation, "swiglu_backward", run, [gate, x, gradient], [gate.dtype, x.dtype])

    def _multiply(self, operation: Any) -> None:
        """Lower a float32 product with a factor that is broadcast, together with an addition that alone reads it."""
        result, values = operation.result(0), [operation.operand_source(0), operation.operand_source(1)]
        if any(dtype_of(value) != "float32" or min(value.shape, default=0) < 1 for value in (result, *values)):
            return
        x, factor = sorted(values, key=lambda value: list(value.shape) != list(result.shape))
        pattern = match_broadcast(list(factor.shape), list(result.shape))
        if list(x.shape) != list(result.shape) or pattern is None or math.prod(x.shape) < _MIN_PRODUCT:
            return
        matrix, of_factor = dense("float32", *pattern.matrix), dense("float32", *pattern.factor)
        inputs, value, addend = [x, self._expanded(factor, pattern.expanded)], result, None
        for epilogue in epilogues_of(result, operation.op_role)[1:2]:
            if epilogue.residual is not None:
                inputs.append(epilogue.residual)
                value, addend = epilogue.value, matrix
        primitive = primitives.multiply(matrix, of_factor, matrix, addend)
        with insert_before(value.get_defining_op()):
            (product,) = add_op("multiply", primitive, primitive, inputs, [("float32", tuple(value.shape))])
            replace_result(value, product)

    def _expanded(self, factor: Any, shape: tuple[int, ...]) -> Any:
        """Return a factor that is broadcast to this shape, which is small. Several readers share it."""
        if math.prod(factor.shape) == math.prod(shape):
            return factor
        key = (factor.id, shape)
        if key not in self._expansions:
            source = factor.get_defining_op()
            pir.set_insertion_point_after(source)
            with operator_role(max(source.op_role, 0)):
                self._expansions[key] = paddle.expand(factor, list(shape))
        return self._expansions[key]

    def _softmax(self, operation: Any) -> None:
        if is_over_last(operation.attrs()["axis"], operation.result(0)):
            x = self._as_matrix(operation, 0)
            dtype = "bfloat16" if can_be_bfloat16(operation.result(0)) else "float32"
            self._replace(
                operation, "softmax", primitives.softmax(x.layout, replace(x.layout, dtype=dtype)), [x], [dtype]
            )

    def _softmax_grad(self, operation: Any) -> None:
        if is_over_last(operation.attrs()["axis"], operation.result(0)):
            out = self._as_matrix(operation, 0)
            gradient = self._as_matrix(operation, 1, out.dtype)
            primitive = primitives.softmax_grad(out.layout, gradient.layout, out.layout)
            self._replace(operation, "softmax_backward", primitive, [out, gradient], [out.dtype])

    def _layer_norm(self, operation: Any) -> None:
        attributes = operation.attrs()
        if is_over_last(attributes["begin_norm_axis"], operation.operand_source(0)) and _has_operands(operation, 3):
            inputs = [self._as_matrix(operation, index, "float32") for index in range(3)]
            layout = inputs[0].layout
            dtype = "bfloat16" if can_be_bfloat16(operation.result(0)) else "float32"
            primitive = primitives.layer_norm(layout, replace(layout, dtype=dtype), attributes["epsilon"])
            self._replace(operation, "layer_norm", primitive, inputs, [dtype, "float32", "float32"])

    def _layer_norm_grad(self, operation: Any) -> None:
        attributes = operation.attrs()
        if is_over_last(attributes["begin_norm_axis"], operation.operand_source(0)) and _has_operands(operation, 6):
            inputs = [self._as_matrix(operation, index, "float32") for index in range(5)]
            gradient = self._as_matrix(operation, 5)
            layout = inputs[0].layout
            primitive = primitives.layer_norm_grad(layout, gradient.layout, layout, attributes["epsilon"])
            shapes = [list(operation.operand_source(index).shape) for index in range(3)]
            self._replace(operation, "layer_norm_backward", primitive, [*inputs, gradient], ["float32"] * 3, shapes)


def _has_operands(operation: Any, number: int) -> bool:
    """Return whether an operator has this many operands, none of them omitted, as a scale may be."""
    return operation.num_operands() == number and all(
        operation.operand_source(index).initialized() for index in range(number)
    )


def _have_same_batch(a: View, b: View) -> bool:
    """Return whether both are matrices, or equally many of them: products with broadcasting are left to Paddle."""
    return len(b.layout.shape) >= 2 and a.layout.shape[:-2] == b.layout.shape[:-2] and len(a.layout.shape) >= 2


def _matmul_operands(operation: Any) -> tuple[View, View]:
    """Return a and b of out = a @ b, transposed as the operator says."""
    a, b = view_of(operation.operand_source(0)), view_of(operation.operand_source(1))
    attributes = operation.attrs()
    return a.transposed if attributes["transpose_x"] else a, b.transposed if attributes["transpose_y"] else b


def _choose_epilogue(
    result: Any, role: int, dtype: str, shape: tuple[int, ...], factor_only: bool = False
) -> tuple[Epilogue, Layout]:
    """Return the longest epilogue that a product of `shape` can have, and the layout that it writes.

    `factor_only`: without a bias or residual.
    """
    for epilogue in reversed(epilogues_of(result, role)):
        is_low = dtype == "bfloat16" and can_be_bfloat16(epilogue.value, is_requested=True)
        layout = epilogue.layout("bfloat16" if is_low else "float32", shape)
        if layout is not None and not (factor_only and (epilogue.bias is not None or epilogue.residual is not None)):
            return epilogue, layout
    raise AssertionError("a product can always write its own result")


def _choose_factor_epilogue(result: Any, role: int, dtype: str) -> tuple[Epilogue, Layout]:
    return _choose_epilogue(result, role, dtype, tuple(result.shape), factor_only=True)
