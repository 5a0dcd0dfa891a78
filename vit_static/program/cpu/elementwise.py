"""Chains of element-wise operations as one oneDNN primitive, which reads each operand and writes the result once.

The numbers are enum values of the version that onednn.py supports (include/oneapi/dnnl/dnnl_types.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from vit_static.program.cpu.onednn import Layout, Primitive, library

_BINARY = {"add": 0x1FFF0, "multiply": 0x1FFF1, "subtract": 0x1FFF5}
_LINEAR = 0x26
# Functions of one operand: kind, and its two parameters, to the second of which a number given with it is added.
_FUNCTIONS = {
    "square": (0x23, 0.0, 0.0),
    "square_root": (0x25, 0.0, 0.0),
    "plus": (_LINEAR, 1.0, 0.0),
    "sigmoid": (0x29, 0.0, 0.0),
    "reciprocal": (0x30, 1.0, -1.0),
}
_SOURCE, _SOURCE_1, _TARGET = 1, 2, 17
_POST_OPERATION = 32768  # times n for the n-th operation after the first

Operation = tuple[str, Layout | float]


def chain(first: str, x: Layout, y: Layout, after: Sequence[Operation]) -> Primitive:
    """Return the kernel that combines two operands, and of the operations that come `after`.

    x is a matrix, and y one of the same shape, a column or a number. `first` is the name of a binary operation. An
    operation after it is a binary one with another operand's layout, or one of: square, square_root, reciprocal and
    sigmoid (with 0), plus and times with a constant, add_to_result with the factor of the result's former value.
    Operands: x, y, those of the operations after the first, and the result. The last may be the memory of any other.
    """
    onednn = library()
    post_ops = onednn.make("post_ops")
    operands = [(_SOURCE, x), (_SOURCE_1, y)]
    for position, (name, argument) in enumerate(after, 1):
        if isinstance(argument, Layout):
            onednn.call("post_ops_append_binary", post_ops, ctypes.c_int(_BINARY[name]), onednn.description(argument))
            operands.append((_POST_OPERATION * position | _SOURCE_1, argument))
        elif name == "add_to_result":
            onednn.call("post_ops_append_sum", post_ops, ctypes.c_float(argument), ctypes.c_int(0), ctypes.c_int(0))
        elif name == "times":
            alpha, beta = ctypes.c_float(argument), ctypes.c_float(0.0)
            onednn.call("post_ops_append_eltwise", post_ops, ctypes.c_int(_LINEAR), alpha, beta)
        else:
            kind, factor, constant = _FUNCTIONS[name]
            alpha, beta = ctypes.c_float(factor), ctypes.c_float(constant + argument)
            onednn.call("post_ops_append_eltwise", post_ops, ctypes.c_int(kind), alpha, beta)
    attributes = onednn.make("primitive_attr")
    onednn.call("primitive_attr_set_post_ops", attributes, post_ops)
    description = onednn.make(
        "binary_primitive_desc",
        onednn.engine,
        ctypes.c_int(_BINARY[first]),
        onednn.description(x),
        onednn.description(y),
        onednn.description(x),
        attributes,
    )
    return Primitive(description, [*operands, (_TARGET, x)])
