"""Model dimensions, random weights and output of the scripts that make weights files of other programs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).with_name("weights")
# No two dimensions are equal by chance, as far as the programs allow.
WIDTH, DEPTH, HEADS, MLP_DIM, PATCH, NUM_CLASSES = 20, 2, 4, 36, 4, 7
IMAGE_SIZE, SQUARE = (12, 20), (12, 12)

Array = npt.NDArray[np.float32]


def random_values(case: str, name: str, shape: tuple[int, ...]) -> Array:
    """Return random values, exact in float32: norm scales around 1, LayerScale factors around 0.5, others around 0."""
    seed = int.from_bytes(hashlib.sha256(f"{case}/{name}".encode()).digest()[:8], "big")
    values = np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)
    last = name.replace("/", ".").rsplit(".", 1)[-1]
    if last in ("gamma", "lambda1"):
        return (0.5 + 0.1 * values).astype(np.float32)
    if ("norm" in name.lower() or ".ln_" in name) and last in ("weight", "scale"):
        return (1.0 + 0.2 * values).astype(np.float32)
    return (0.2 * values).astype(np.float32)


def images(case: str, size: tuple[int, int]) -> Array:
    """Return random images [2, 3, height, width]."""
    return random_values(case, "images", (2, 3, *size))


def record(cases: Mapping[str, tuple[Array, npt.ArrayLike]], npz: str) -> None:
    """Write the images and logits of each case to weights/NPZ."""
    arrays = {}
    for case, (case_images, logits) in cases.items():
        arrays[f"{case}/images"], arrays[f"{case}/logits"] = case_images, logits
    golden.write(FOLDER / npz, arrays)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
