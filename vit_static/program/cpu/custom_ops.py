"""Custom operators: Python functions on memory addresses as operators of a compiled program."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import paddle
from paddle.base import core, framework
from paddle.static import MetaTensor

from vit_static.program.cpu import primitives
from vit_static.program.cpu.onednn import dense
from vit_static.program.cpu.patterns import dtype_of

_names: dict[Hashable, str] = {}
_one_at_a_time = threading.Lock()
_CPU = core.CPUPlace()


def has_custom_ops() -> bool:
    """Return whether this process has created any.

    If so, it can't open a program in Paddle Inference 3.3.1, which takes them for operators of a custom library and
    ends the process.
    """
    return bool(_names)


def add_op(
    kernel: str,
    key: Hashable,
    run: Callable[..., None],
    inputs: list[Any],
    outputs: list[tuple[str, tuple[int, ...]]],
) -> list[Any]:
    """Add an operator at the insertion point, and return its results.

    `run` is called with the addresses of the inputs and outputs, and fills the outputs, which are given as (dtype,
    shape). Paddle identifies an operator's function by its name: operators with equal `kernel` and `key` share one.
    """

    results_of = [(list(shape), getattr(paddle, dtype)) for dtype, shape in outputs]

    def call(*tensors: paddle.Tensor) -> Any:
        with _one_at_a_time:  # kernels store their operands' addresses, and share scratch memory
            results = _empty(results_of)
            run(*(tensor.data_ptr() for tensor in (*tensors, *results)))
        return results[0] if len(results) == 1 else tuple(results)

    def infer(*_: Any) -> Any:
        metas = [MetaTensor(shape=list(shape), dtype=getattr(paddle, dtype)) for dtype, shape in outputs]
        return metas[0] if len(metas) == 1 else tuple(metas)

    name = _names.setdefault((kernel, key, tuple(outputs)), f"vit_static_{kernel}_{len(_names)}")
    return _python_op(name, inputs, len(outputs), infer, call)


def add_in_place_op(kernel: str, run: Callable[..., None], inputs: list[Any], changed: list[int]) -> list[Any]:
    """Add an operator at the insertion point that changes inputs, and return as results those at positions `changed`.

    If there are none, it has one result without a meaning.

    `run` is called with the addresses of the inputs. Its program alone has this operator, so it may keep state. Other
    operators that read a changed input itself see the change if they come later in the program.
    """

    def call(*tensors: paddle.Tensor) -> Any:
        with _one_at_a_time:
            run(*(tensor.data_ptr() for tensor in tensors))
        results = tuple(tensors[position] for position in changed)
        return results[0] if len(results) == 1 else results or _empty([([1], paddle.float32)])[0]

    shapes = [(list(inputs[position].shape), inputs[position].dtype) for position in changed] or [([1], paddle.float32)]

    def infer(*_: Any) -> Any:
        metas = [MetaTensor(shape=shape, dtype=dtype) for shape, dtype in shapes]
        return metas[0] if len(metas) == 1 else tuple(metas)

    name = _names.setdefault((kernel, len(_names)), f"vit_static_{kernel}_{len(_names)}")
    return _python_op(name, inputs, len(shapes), infer, call)


def _python_op(name: str, inputs: list[Any], num_outputs: int, infer: Any, call: Any) -> list[Any]:
    return list(
        paddle._C_ops._run_python_op(
            *inputs,
            name=name,
            input_names=[f"in{index}" for index in range(len(inputs))],
            output_names=[f"out{index}" for index in range(num_outputs)],
            attrs={"infer_meta_fn_ptr": infer, "fn_ptr": call},
            inplace_map={},
        )
    )


def _empty(described: list[tuple[list[int], Any]]) -> list[paddle.Tensor]:
    """Return uninitialized tensors with these shapes and dtypes, while a program runs.

    The public way, `paddle.empty` within Paddle's guard for dynamic mode, takes longer than a small kernel.
    """
    previous = framework.global_var._dygraph_tracer_
    core._switch_tracer(_tracer())
    try:
        return [core.eager.ops.empty(shape, dtype, _CPU) for shape, dtype in described]
    finally:
        core._switch_tracer(previous)


@cache
def _tracer() -> Any:
    """Return the object that creates tensors in dynamic mode. Without one Paddle dies."""
    return core.Tracer()


def convert(value: Any, dtype: str) -> Any:
    """Add an operator that converts a value to another dtype, and return its result."""
    length = math.prod(value.shape)
    primitive = primitives.convert(dense(dtype_of(value), length), dense(dtype, length))
    (converted,) = add_op("convert", primitive, primitive, [value], [(dtype, tuple(value.shape))])
    return converted


def replace_result(result: Any, value: Any) -> None:
    """Let the readers of `result` read `value`, converted to the dtype that they expect.

    The lowering of the next operators looks through the conversion.
    """
    dtype = dtype_of(result)
    result.replace_all_uses_with(value if dtype_of(value) == dtype else convert(value, dtype))
