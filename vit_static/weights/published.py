"""Published models of other programs: numbers of heads, which most files don't determine."""

from __future__ import annotations

from typing import Literal, NamedTuple

from vit_static.model.variants import VARIANTS


class _Shape(NamedTuple):
    width: int
    depth: int
    mlp_dim: int
    mlp: Literal["gelu", "swiglu"]


# Beside those of VARIANTS.
_NUM_HEADS = {
    # DINOv2 g/14; DINOv3 S+, H+ and 7B/16 (arXiv 2508.10104)
    _Shape(1536, 40, 4096, "swiglu"): 24,
    _Shape(384, 12, 1536, "swiglu"): 6,
    _Shape(1280, 32, 5120, "swiglu"): 20,
    _Shape(4096, 40, 8192, "swiglu"): 32,
    # EVA-02 Ti, S, B and L (arXiv 2303.11331)
    _Shape(192, 12, 512, "swiglu"): 3,
    _Shape(384, 12, 1024, "swiglu"): 6,
    _Shape(768, 12, 2048, "swiglu"): 12,
    _Shape(1024, 24, 2730, "swiglu"): 16,
    # timm's wee, little, medium, mediumd, betwixt, so150m and so150m2; EVA g/14
    _Shape(256, 14, 1280, "gelu"): 4,
    _Shape(320, 14, 1792, "gelu"): 5,
    _Shape(512, 12, 2048, "gelu"): 8,
    _Shape(512, 20, 2048, "gelu"): 8,
    _Shape(640, 12, 2560, "gelu"): 10,
    _Shape(896, 18, 2304, "gelu"): 14,
    _Shape(832, 21, 2176, "gelu"): 13,
    # SigLIP's so400m, SigLIP 2's g-opt (arXiv 2502.14786), OpenCLIP's B-plus
    _Shape(1152, 27, 4304, "gelu"): 16,
    _Shape(1536, 40, 6144, "gelu"): 16,
    _Shape(896, 12, 3584, "gelu"): 14,
    # ViT-5 XL (arXiv 2602.08071)
    _Shape(1152, 28, 4608, "gelu"): 16,
}


def published_num_heads(width: int, depth: int, mlp_dim: int, mlp: str) -> int | None:
    """Return the number of heads of the published model of this shape; None for any other: a guess could be wrong."""
    for shape, num_heads in _NUM_HEADS.items():
        if shape == (width, depth, mlp_dim, mlp):
            return num_heads
    for variant in VARIANTS.values():
        if mlp == "gelu" and (variant.width, variant.depth, variant.mlp_dim) == (width, depth, mlp_dim):
            return variant.num_heads
    return None
