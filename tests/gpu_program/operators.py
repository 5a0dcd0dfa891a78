"""The operators of compiled programs, by name.

An operator is a function from its inputs to its results. Positional parameters are the inputs, in the program's order:
arrays, None for an input that isn't there, a sequence for a vector of tensors (`builtin.combine`). Keyword parameters
are the attributes. A function names all of its attributes, so that none is ignored by mistake, and asserts the values
that it relies on.

Functions compute in float32, as the GPU's kernels do: the interpreter converts inputs in half precision before, and
rounds the results to the dtypes that the program declares after. Results never share memory with inputs, except where
the table says so. A function may name two more keywords, which the interpreter supplies:

- `rounded(x)` rounds float32 values to the dtype of the first input.
- `new_seed()` draws from the rank's random generator.

Collectives aren't here: they are between ranks (interpreter.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_program import array_operators as arrays
from gpu_program import layer_operators as layers
from gpu_program import update_operators as updates


@dataclass(frozen=True, eq=False)
class Operator:
    """How an operator is computed, and which memory its results are in."""

    function: Callable[..., Any]
    in_place: Mapping[int, int] = field(default_factory=dict)  # from a result to the input whose memory it overwrites
    always_float32: frozenset[int] = frozenset()  # results that the kernel stores in float32, whatever is declared


# Element-wise, from the function of NumPy that computes the same.
_IN_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "divide": np.divide,
    "equal": np.equal,
    "greater_equal": np.greater_equal,
    "greater_than": np.greater,
    "isfinite": np.isfinite,
    "isnan": np.isnan,
    "less_than": np.less,
    "logical_or": np.logical_or,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "sign": np.sign,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "subtract": np.subtract,
    "tanh": np.tanh,
    "where": np.where,
}
_OPERATORS: dict[str, Operator] = {
    **{name: Operator(function) for name, function in _IN_NUMPY.items()},
    # constants
    "arange": Operator(arrays.arange),
    "full": Operator(arrays.full),
    "full_int_array": Operator(arrays.full_int_array),
    "full_like": Operator(arrays.full_like),
    "one_hot": Operator(arrays.one_hot),
    # copies and shapes
    "assign": Operator(arrays.copy),
    "assign_out_": Operator(arrays.assign_out, in_place={0: 1}),
    "cast": Operator(arrays.copy),
    "concat": Operator(arrays.concat),
    "concat_grad": Operator(arrays.concat_grad),
    "expand": Operator(arrays.expand),
    "flatten": Operator(arrays.flatten),
    "flatten_grad": Operator(arrays.reshape_like),
    "reshape": Operator(arrays.reshape),
    "reshape_grad": Operator(arrays.reshape_like),
    "set_value_with_tensor_": Operator(arrays.set_value, in_place={0: 0}),
    "slice": Operator(arrays.slice_array),
    "slice_grad": Operator(arrays.slice_grad),
    "split": Operator(arrays.split),
    "split_with_num": Operator(arrays.split_with_num),
    "stack": Operator(arrays.stack),
    "stack_grad": Operator(arrays.stack_grad),
    "take_along_axis": Operator(arrays.take_along_axis),
    "transpose": Operator(arrays.transpose),
    "transpose_grad": Operator(arrays.transpose_grad),
    "unsqueeze": Operator(arrays.unsqueeze),
    # element-wise arithmetic and reductions
    "clip": Operator(arrays.clip),
    "add_": Operator(np.add, in_place={0: 0}),
    "add_grad": Operator(arrays.add_grad),
    "add_n": Operator(arrays.add_n),
    "argmax": Operator(arrays.argmax),
    "max": Operator(arrays.max_over),
    "mean": Operator(arrays.mean),
    "mean_grad": Operator(arrays.mean_grad),
    "multiply_grad": Operator(arrays.multiply_grad),
    "rsqrt": Operator(arrays.rsqrt),
    "scale": Operator(arrays.scale),
    "squared_l2_norm": Operator(arrays.squared_l2_norm),
    "sum": Operator(arrays.sum_over),
    "sum_grad": Operator(arrays.sum_grad),
    "tanh_grad": Operator(arrays.tanh_grad),
    # products, normalization, activations
    "fused_gemm_epilogue": Operator(layers.fused_gemm_epilogue),
    "fused_gemm_epilogue_grad": Operator(layers.fused_gemm_epilogue_grad),
    "gelu": Operator(layers.gelu),
    "gelu_grad": Operator(layers.gelu_grad),
    "layer_norm": Operator(layers.layer_norm),
    "layer_norm_grad": Operator(layers.layer_norm_grad),
    "log_softmax": Operator(layers.log_softmax),
    "log_softmax_grad": Operator(layers.log_softmax_grad),
    "matmul": Operator(layers.matmul),
    "matmul_grad": Operator(layers.matmul_grad),
    "softmax": Operator(layers.softmax),
    "softmax_grad": Operator(layers.softmax_grad),
    # dropout and attention
    "dropout": Operator(layers.dropout),
    "dropout_grad": Operator(layers.dropout_grad),
    "flash_attn": Operator(layers.flash_attn, always_float32=frozenset({2})),
    "flash_attn_grad": Operator(layers.flash_attn_grad),
    "fused_dropout_add": Operator(layers.fused_dropout_add),
    "fused_dropout_add_grad": Operator(layers.fused_dropout_add_grad),
    # the update
    "adamw_": Operator(updates.adamw, in_place={0: 0, 1: 3, 2: 4, 3: 5, 4: 6, 5: 7, 6: 8}),
}
OPERATORS: dict[str, Operator] = {f"pd_op.{name}": operator for name, operator in _OPERATORS.items()}
