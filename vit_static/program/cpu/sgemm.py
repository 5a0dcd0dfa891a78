"""Matrix products of MKLML, the BLAS library in Paddle's x86 wheel: an alternative to oneDNN's for some shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from vit_static.program.cpu.mklml import find_function
from vit_static.program.cpu.onednn import Layout
from vit_static.program.cpu.primitives import MAX_PRIMITIVES

_ROW_MAJOR, _NOT_TRANSPOSED, _TRANSPOSED = 101, 111, 112  # CBLAS_LAYOUT and CBLAS_TRANSPOSE of cblas.h


@cache
def _cblas_sgemm() -> Any:
    """Return the library's function; None in a wheel with another BLAS."""
    function = find_function("cblas_sgemm")
    if function is not None:
        number, real, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        function.argtypes = [number] * 6 + [real, address, number, address, number, real, address, number]
        function.restype = None
    return function


def _storage(layout: Layout) -> tuple[int, int] | None:
    """Return whether a matrix is stored transposed, as BLAS numbers it, and the elements between stored rows.

    None if neither its rows nor its columns are contiguous.
    """
    (rows, columns), (row, column) = layout.shape, layout.strides
    if column == 1 and row >= columns:
        return _NOT_TRANSPOSED, row
    if row == 1 and column >= rows:
        return _TRANSPOSED, column
    return None


@lru_cache(MAX_PRIMITIVES)
def product(a: Layout, b: Layout, out: Layout, factor: float = 1.0) -> Callable[[int, int, int], None] | None:
    """Return the kernel of out = (a @ b) * factor for float32 matrices; None if the library can't compute it.

    Operands: the addresses of a, b and out, as of `primitives.matmul`.
    """
    layouts = (a, b, out)
    if any(layout.dtype != "float32" or len(layout.shape) != 2 for layout in layouts):
        return None
    function, storages = _cblas_sgemm(), [_storage(layout) for layout in layouts]
    if function is None or None in storages:
        return None
    (a_order, a_row), (b_order, b_row), (out_order, out_row) = (storage for storage in storages if storage is not None)
    if out_order != _NOT_TRANSPOSED:
        return None
    (rows, depth), columns = a.shape, b.shape[1]

    def run(a_address: int, b_address: int, out_address: int) -> None:
        function(
            _ROW_MAJOR, a_order, b_order, rows, columns, depth,
            factor, a_address, a_row, b_address, b_row, 0.0, out_address, out_row,
        )  # fmt: skip

    return run
