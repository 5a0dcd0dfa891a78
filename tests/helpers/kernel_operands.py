"""Operands of CPU kernels in memory, as float32 or bfloat16, and the float64 values that they represent."""

from __future__ import annotations

import numpy as np
import pytest

BFLOAT16 = pytest.param("bfloat16", marks=pytest.mark.needs_bfloat16)
DTYPES = ["float32", BFLOAT16]
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # of the largest value
rng = np.random.default_rng(0)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values as in memory: bfloat16 as the upper halves of float32's bits, rounded to the nearest."""
    bits = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return bits.copy()
    as_integers = bits.view(np.uint32)
    return ((as_integers + 0x7FFF + ((as_integers >> 16) & 1)) >> 16).astype(np.uint16)


def loaded(memory: np.ndarray) -> np.ndarray:
    if memory.dtype == np.float32:
        return memory.astype(np.float64)
    return (memory.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def normal_values(dtype: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normally distributed values as in memory, and the float64 values that they represent."""
    memory = stored(rng.standard_normal(shape), dtype)
    return memory, loaded(memory)


def empty(dtype: str, *shape: int) -> np.ndarray:
    return stored(np.full(shape, np.nan), dtype)


def close(
    memory: np.ndarray, expected: np.ndarray, dtype: str, rounding: float = 0.0, least_scale: float = 0.0
) -> None:
    """Compare values in memory with those expected, to within a share of the largest.

    `rounding`: a larger share, as of rounded inputs. `least_scale`: the size of terms whose sum is expected to be less.
    """
    atol = max(TOLERANCE[dtype], rounding) * max(np.abs(expected).max(), least_scale)
    np.testing.assert_allclose(loaded(memory), expected, atol=atol, rtol=0)


def address(memory: np.ndarray) -> int:
    return int(memory.ctypes.data)
