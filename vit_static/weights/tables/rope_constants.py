"""Model hints from the constants of rotary positions in a file: buffers that its program saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_static.weights.name_maps import MAX_BLOCKS
from vit_static.weights.state import State

CONSTANTS = "holds constants"
# Buffers may be in half precision, whose relative error is at most 2 ** -8.
_TOLERANCE = 2.0**-7


def _find_base(is_base: Callable[[float], bool], estimate: float, name: str) -> float:
    """Return the base near an estimate, rounded if a rounded one fits as well. Raises ValueError if none fits."""
    for digits in (1, 2, 3, 6):
        base = float(f"{estimate:.{digits}g}")
        if is_base(base):
            return base
    raise ValueError(f"{name} holds rotary positions of another kind than this model's: no base gives them")


def hints_of_periods(periods: np.ndarray, width: int, name: str) -> dict[str, Any]:
    """Return the number of heads and the base from DINOv3's periods [d / 4], which are base ** (4 i / d)."""
    if periods.ndim != 1 or not len(periods) or width % (4 * len(periods)):
        raise ValueError(f"{name} has the shape {list(periods.shape)}, which doesn't fit a width of {width}")
    hints: dict[str, Any] = {"num_heads": width // (4 * len(periods))}
    if len(periods) > 1:
        exponents = np.arange(len(periods)) / len(periods)
        if not periods[-1] > 1.0:
            raise ValueError(f"{name} holds rotary positions of another kind than this model's: no base gives them")
        base = _find_base(
            lambda base: np.allclose(base**exponents, periods, rtol=_TOLERANCE, atol=0.0),
            float(periods[-1]) ** (1.0 / exponents[-1]),
            name,
        )
        hints["rope_base"] = base
    return hints


def hints_of_tables(cos: np.ndarray, sin: np.ndarray, width: int, name: str) -> dict[str, Any]:
    """Return the number of heads, the base and the grid from EVA-02's tables [patches, d].

    A square of patches has the angles row * f and column * f, each repeated, with f = grid / side * base ** -(4 i / d).
    """
    side, head_dim = (math.isqrt(len(cos)), cos.shape[1]) if cos.ndim == 2 else (0, 0)
    fits_width = head_dim > 0 and head_dim % 4 == 0 and width % head_dim == 0
    if side < 2 or side * side != len(cos) or cos.shape != sin.shape or not fits_width:
        raise ValueError(f"{name} has the shape {list(cos.shape)}, which doesn't fit a width of {width}")
    of_column = np.arctan2(sin[1], cos[1])[head_dim // 2 :: 2].astype(np.float64)  # row 0, column 1
    exponents = -np.arange(head_dim // 4) / (head_dim // 4)
    scale = float(of_column[0]) % (2.0 * math.pi)  # more than half a turn on fewer than six patches of EVA-02
    grid = max(round(scale * side), 1)
    columns = np.arange(side) * grid / side

    def fits(base: float) -> bool:
        angles = np.repeat(np.outer(columns, base**exponents), 2, axis=1)  # [side, d / 2]
        both = np.concatenate([np.repeat(angles, side, axis=0), np.tile(angles, (side, 1))], axis=1)
        return bool(np.allclose(np.cos(both), cos, atol=_TOLERANCE) and np.allclose(np.sin(both), sin, atol=_TOLERANCE))

    hints: dict[str, Any] = {"num_heads": width // head_dim, "rope_grid": (grid, grid)}
    if head_dim > 4 and scale > 0.0 and of_column[1] > 0.0:
        estimate = float(of_column[1] / scale) ** (1.0 / exponents[1])
        hints["rope_base"] = _find_base(fits, estimate, name)
    return hints


def frequencies_by_block(state: State) -> State:
    """Separate the learned frequencies of mixed positions by block: timm's `rope.freqs`, the authors' `freqs`.

    [2, depth, H, d / 2] or [2, depth, C / 2], of columns, then of rows, become [2, C / 2] per block, of rows first.
    """
    arrays = dict(state)
    for name in ("rope.freqs", "freqs"):
        if name in arrays:
            frequencies = arrays.pop(name)
            if frequencies.ndim not in (3, 4) or len(frequencies) != 2 or frequencies.shape[1] > MAX_BLOCKS:
                raise ValueError(f"{name} has the shape {list(frequencies.shape)}, which doesn't fit frequencies")
            for number in range(frequencies.shape[1]):
                of_block = frequencies[::-1, number].reshape(2, -1)
                arrays[f"blocks.{number}.attn.rope.frequencies"] = np.ascontiguousarray(of_block)
    return arrays


def stack_frequencies(arrays: State, num_heads: int) -> State:
    """Put the blocks' frequencies into one array, as timm has them; inverse of `frequencies_by_block`."""
    names = [name for name in arrays if name.endswith(".attn.rope.frequencies")]
    if not names:
        return arrays
    names.sort(key=lambda name: int(name.split(".")[1]))
    stacked = np.stack([arrays[name][::-1].reshape(2, num_heads, -1) for name in names], axis=1)
    rest = {name: array for name, array in arrays.items() if name not in names}
    return rest | {"rope.freqs": np.ascontiguousarray(stacked)}
