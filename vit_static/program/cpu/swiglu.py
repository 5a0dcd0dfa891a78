"""SwiGLU, silu(gate) * x, and its gradients by oneDNN primitives, without memory besides the results."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from vit_static.program.cpu import primitives
from vit_static.program.cpu.onednn import Layout


@lru_cache(primitives.MAX_PRIMITIVES)
def swiglu(layout: Layout) -> Callable[[int, int, int], None]:
    """Return the kernel of silu(gate) * x. Operands: gate, x, out."""
    silu, multiply = primitives.silu(layout), primitives.multiply(layout, layout, layout)

    def run(gate: int, x: int, out: int) -> None:
        silu(gate, out)
        multiply(out, x, out)

    return run


@lru_cache(primitives.MAX_PRIMITIVES)
def swiglu_grad(layout: Layout) -> Callable[[int, int, int, int, int], None]:
    """Return the kernel of its gradients. Operands: gate, x, out_grad, gate_grad, x_grad; it writes the last two."""
    silu, silu_grad = primitives.silu(layout), primitives.silu_grad(layout)
    multiply = primitives.multiply(layout, layout, layout)

    def run(gate: int, x: int, out_grad: int, gate_grad: int, x_grad: int) -> None:
        multiply(out_grad, x, gate_grad)
        silu_grad(gate, gate_grad, gate_grad)
        silu(gate, x_grad)
        multiply(x_grad, out_grad, x_grad)

    return run
