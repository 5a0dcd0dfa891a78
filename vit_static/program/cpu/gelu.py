"""GELU and its gradient; in float32 the tanh approximation as a chain of operations on values in registers or caches.

It is x * sigmoid(w) with w = x * (2c + 2c * 0.044715 * x^2) and c = sqrt(2 / pi), which is the same function. oneDNN's
tanh for AVX2 looks coefficients up in a table, and takes four times as long as its sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from vit_static.program.cpu import primitives
from vit_static.program.cpu.elementwise import Operation, chain
from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.cpu.scratch import num_threads, scratch_memory

_BLOCK = 1 << 16  # elements per thread, for which a gradient's intermediate values are stored
_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)  # w = _CUBIC * x^3 + _LINEAR * x
_CUBIC = _LINEAR * 0.044715


_Kernel = Callable[..., None]


def gelu(layout: Layout, approximate: bool) -> _Kernel:
    """Return the kernel of GELU, exact or by the tanh approximation. Operands: x, out."""
    if approximate and layout.dtype == "float32":
        return tanh_gelu(math.prod(layout.shape))
    return primitives.gelu(layout, layout, approximate)


def gelu_grad(layout: Layout, approximate: bool) -> _Kernel:
    """Return the kernel of GELU's gradient. Operands: x, out_grad, x_grad."""
    if approximate and layout.dtype == "float32":
        return tanh_gelu_grad(math.prod(layout.shape))
    return primitives.gelu_grad(layout, layout, layout, approximate)


@lru_cache(primitives.MAX_PRIMITIVES)
def tanh_gelu(length: int) -> _Kernel:
    """Return the kernel of the tanh approximation for a float32 vector. Operands: x, out."""
    x = dense("float32", 1, length)
    steps: list[Operation] = [("times", _CUBIC), ("plus", _LINEAR), ("multiply", x), ("sigmoid", 0.0), ("multiply", x)]
    kernel = chain("multiply", x, x, steps)

    def run(x: int, out: int) -> None:
        kernel(x, x, x, x, out)

    return run


@lru_cache(primitives.MAX_PRIMITIVES)
def tanh_gelu_grad(length: int) -> _Kernel:
    """Return the kernel of its gradient. Operands: x, out_grad, x_grad."""
    block = min(_BLOCK * num_threads(), length)
    blocks = [(4 * start, _GradBlock(min(block, length - start))) for start in range(0, length, block)]

    def run(x: int, out_grad: int, x_grad: int) -> None:
        sigmoid, complement = scratch_memory(4 * block, 4 * block)
        for offset, kernel in blocks:
            kernel(x + offset, out_grad + offset, x_grad + offset, sigmoid, complement)

    return run


class _GradBlock:
    """The kernel of a block: (1 + x * w' * (1 - s)) * s * out_grad, where s = sigmoid(w)."""

    def __init__(self, length: int) -> None:
        x = dense("float32", 1, length)
        argument: list[Operation] = [("times", _CUBIC), ("plus", _LINEAR), ("multiply", x)]
        self._sigmoid = chain("multiply", x, x, [*argument, ("sigmoid", 0.0)])
        self._complement = primitives.linear(x, -1.0, 1.0)
        slope: list[Operation] = [("times", 3.0 * _CUBIC), ("plus", _LINEAR), ("multiply", x)]
        self._gradient = chain(
            "multiply", x, x, [*slope, ("multiply", x), ("plus", 1.0), ("multiply", x), ("multiply", x)]
        )

    def __call__(self, x: int, out_grad: int, x_grad: int, sigmoid: int, complement: int) -> None:
        self._sigmoid(x, x, x, sigmoid)
        self._complement(sigmoid, complement)
        self._gradient(x, x, x, complement, sigmoid, out_grad, x_grad)
