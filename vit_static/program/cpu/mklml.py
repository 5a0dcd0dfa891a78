"""Exponentials by MKLML, the vector mathematics in Paddle's wheel, which on AVX2 takes less time than oneDNN's.

It runs on the same OpenMP threads, which Paddle has started. Results are rounded within 1 unit in the last place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

from vit_static.program.cpu import primitives
from vit_static.program.cpu.onednn import dense

_LOW_ACCURACY, _FLUSH_DENORMALS, _IGNORE_ERRORS = 0x1, 0x280000, 0x100  # mkl_vml_defines.h


@cache
def _vms_exp() -> Callable[..., int] | None:
    """Return the library's exponential function of float32 vectors; None in a wheel without it."""
    import paddle

    try:
        library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"))
    except OSError:
        return None
    function: Callable[..., int] | None = getattr(library, "vmsExp", None)
    return function


@lru_cache(primitives.MAX_PRIMITIVES)
def exponential(length: int) -> Callable[[int, int], None]:
    """Return the kernel of exp of a float32 vector. Operands: x, out, which may be the same memory."""
    vms_exp = _vms_exp()
    if vms_exp is None:
        layout = dense("float32", length)
        return primitives.exponential(layout)
    count, mode = ctypes.c_int(length), ctypes.c_int64(_LOW_ACCURACY | _FLUSH_DENORMALS | _IGNORE_ERRORS)

    def run(x: int, out: int) -> None:
        vms_exp(count, ctypes.c_void_p(x), ctypes.c_void_p(out), mode)

    return run
