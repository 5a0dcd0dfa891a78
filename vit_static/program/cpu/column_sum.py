"""Column sums, such as gradients of biases, as products with ones: oneDNN 3.6 sums columns in a reference loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np

from vit_static.program.cpu import primitives
from vit_static.program.cpu.onednn import Layout, dense


@lru_cache(primitives.MAX_PRIMITIVES)
def column_sum(matrix: Layout) -> Callable[[int, int], None]:
    """Return the kernel of the sums of a contiguous matrix's columns, in float32. Operands: matrix, out."""
    num_rows, num_columns = matrix.shape
    vector = ones(matrix.dtype, num_rows).ctypes.data
    if matrix.dtype == "float32":  # its kernel of a matrix times a vector reads memory faster than the transposed one
        column, out = dense("float32", num_rows, 1), dense("float32", num_columns, 1)
        product = primitives.matmul(matrix.transposed, column, out)
        return lambda address, sums: product(address, vector, sums)
    row, out = dense(matrix.dtype, 1, num_rows), dense("float32", 1, num_columns)
    product = primitives.matmul(row, matrix, out)
    return lambda address, sums: product(vector, address, sums)


@cache
def ones(dtype: str, length: int) -> np.ndarray:
    """Return a vector of ones, the same one each time; bfloat16 as its bits."""
    return np.full(length, 0x3F80, np.uint16) if dtype == "bfloat16" else np.ones(length, dtype)
