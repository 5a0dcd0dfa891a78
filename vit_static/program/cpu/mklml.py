"""MKLML, the mathematics library in Paddle's x86 wheel: its exponentials take less time than oneDNN's on AVX2.

Its matrix products are in sgemm.py. It runs on the same OpenMP threads, which Paddle has started. Exponentials are
rounded within 1 unit in the last place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from vit_static.program.cpu import primitives
from vit_static.program.cpu.onednn import dense

_LOW_ACCURACY, _FLUSH_DENORMALS, _IGNORE_ERRORS = 0x1, 0x280000, 0x100  # mkl_vml_defines.h


@cache
def find_function(name: str) -> Any:
    """Return a function of the library's C interface; None in a wheel without it."""
    import paddle  # also loads the OpenMP library that MKLML depends on

    try:
        library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"))
    except OSError:
        return None
    return getattr(library, name, None)


@lru_cache(primitives.MAX_PRIMITIVES)
def exponential(length: int) -> Callable[[int, int], None]:
    """Return the kernel of exp of a float32 vector. Operands: x, out, which may be the same memory."""
    vms_exp = find_function("vmsExp")
    if vms_exp is None:
        layout = dense("float32", length)
        return primitives.exponential(layout)
    count, mode = ctypes.c_int(length), ctypes.c_int64(_LOW_ACCURACY | _FLUSH_DENORMALS | _IGNORE_ERRORS)

    def run(x: int, out: int) -> None:
        vms_exp(count, ctypes.c_void_p(x), ctypes.c_void_p(out), mode)

    return run
