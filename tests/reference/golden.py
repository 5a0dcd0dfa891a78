"""Writer of the reference files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAX_BYTES = 300_000


def write(path: Path, arrays: Mapping[str, npt.ArrayLike]) -> None:
    """Write a compressed .npz, floats rounded to float32, complete or not at all.

    The same arrays give the same bytes: NumPy stamps the members of an .npz with a fixed date.
    """
    stored: dict[str, npt.NDArray[np.generic]] = {}
    for name, value in arrays.items():
        array = np.array(value, order="C")
        if array.dtype.kind == "f":
            assert np.isfinite(array).all(), name
            array = array.astype(np.float32)
        stored[name] = array
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **stored)  # type: ignore[arg-type]
    assert partial.stat().st_size < MAX_BYTES, f"{path.name}: {partial.stat().st_size} bytes"
    partial.replace(path)
    for name, array in stored.items():
        print(f"{name}  {array.dtype}  {list(array.shape)}")
