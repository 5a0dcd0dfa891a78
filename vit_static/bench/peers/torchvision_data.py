"""Training images with torchvision's transforms in worker processes, as PyTorch's DataLoader runs them.

`python torchvision_data.py SPEC` with the SPEC of bench/data.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pil_data
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode


@cache
def _transform(values: tuple[Any, ...]) -> transforms.Compose:
    image_size, scale, ratio, interpolation, flip_probability, mean, std = values
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale, ratio, InterpolationMode(interpolation), antialias=True),
            transforms.RandomHorizontalFlip(flip_probability),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def load(path: str, spec: dict[str, Any], rng: np.random.Generator, out: np.ndarray) -> None:
    """Load a training image into `out`, [3, height, width] float32."""
    torch.set_num_threads(1)  # of a worker: each has a core of its own
    keys = ("image_size", "crop_scale", "crop_aspect_ratio", "interpolation", "flip_probability", "mean", "std")
    values = tuple(tuple(spec[key]) if isinstance(spec[key], list) else spec[key] for key in keys)
    torch.manual_seed(int(rng.integers(2**62)))
    with Image.open(path) as opened:
        out[:] = _transform(values)(opened.convert("RGB")).numpy()


if __name__ == "__main__":
    pil_data.main(load, torchvision.__version__)
