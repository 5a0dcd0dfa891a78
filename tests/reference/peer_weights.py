"""What the scripts that make files of peers' weights share: sizes, random weights, and where the files go."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import golden
import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).with_name("weights")
# Nothing square or equal by chance, as far as the program allows.
WIDTH, DEPTH, HEADS, MLP_DIM, PATCH, NUM_CLASSES = 20, 2, 4, 36, 4, 7
IMAGE_SIZE, SQUARE = (12, 20), (12, 12)

Array = npt.NDArray[np.float32]


def random_values(case: str, name: str, shape: tuple[int, ...]) -> Array:
    """Norms' scales about 1, LayerScale's factors about 0.5, all else about 0; exact in float32."""
    seed = int.from_bytes(hashlib.sha256(f"{case}/{name}".encode()).digest()[:8], "big")
    values = np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)
    last = name.replace("/", ".").rsplit(".", 1)[-1]
    if last in ("gamma", "lambda1"):
        return (0.5 + 0.1 * values).astype(np.float32)
    if "norm" in name.lower() and last in ("weight", "scale"):
        return (1.0 + 0.2 * values).astype(np.float32)
    return (0.2 * values).astype(np.float32)


def images(case: str, size: tuple[int, int]) -> Array:
    """[2, 3, height, width]."""
    return random_values(case, "images", (2, 3, *size))


def record(cases: Mapping[str, tuple[Array, npt.ArrayLike]], npz: str) -> None:
    """Each case's images and logits, into weights/NPZ."""
    arrays = {}
    for case, (of_case, logits) in cases.items():
        arrays[f"{case}/images"], arrays[f"{case}/logits"] = of_case, logits
    golden.write(FOLDER / npz, arrays)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
