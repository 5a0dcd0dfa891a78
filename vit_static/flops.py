"""Operations and parameters of a ViT in closed form, and the peak rates of known cards."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What the counts depend on. `num_tokens` are the patches, and the class token and registers if there are any;
    `num_pooled` of them, or of their means, are the head's input."""

    num_patches: int
    num_tokens: int
    patch_dim: int
    width: int
    depth: int
    mlp_dim: int
    num_classes: int
    representation_size: int | None
    num_pooled: int = 1


def forward_macs(shape: Shape) -> int:
    """Multiply-adds of one image's forward pass: the matrix products, as is usual, without norms and softmax."""
    num_tokens, width = shape.num_tokens, shape.width
    embedding = shape.num_patches * shape.patch_dim * width
    projections = 4 * num_tokens * width**2  # q, k, v and the output's
    attention = 2 * num_tokens**2 * width  # the scores, and their product with the values
    mlp = 2 * num_tokens * width * shape.mlp_dim
    if shape.representation_size is None:
        head = shape.num_pooled * width * shape.num_classes
    else:
        head = shape.representation_size * (shape.num_pooled * width + shape.num_classes)
    return embedding + shape.depth * (projections + attention + mlp) + head


def train_flops(shape: Shape) -> int:
    """Operations of one image's training step: a multiply-add is two, the backward costs two forwards."""
    return 3 * 2 * forward_macs(shape)


# Dense peak in operations a second by a part of the card's name and by precision: NVIDIA's data sheets.
_PEAK_FLOPS: dict[str, dict[str, float]] = {
    "H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "H100 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 60e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    "V100": {"float16": 125e12, "float32": 15.7e12},
    "A10": {"bfloat16": 125e12, "float16": 125e12, "float32": 31.2e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "float32": 91.6e12},
    "L40": {"bfloat16": 181e12, "float16": 181e12, "float32": 90.5e12},
    "L4": {"bfloat16": 121e12, "float16": 121e12, "float32": 30.3e12},
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The card's dense peak for `dtype`, or None where it isn't known (every CPU, among others)."""
    for name, rates in _PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return rates.get(dtype)
    return None
