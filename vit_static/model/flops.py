"""Operations of a Vision Transformer in closed form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Dimensions that determine the number of operations per image.

    `num_tokens` counts the patches, the class token and the registers. The head reads `num_pooled` states of `width`
    each: one token or mean, or both side by side.
    """

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
    """Return the multiply-adds of a forward pass per image: matrix products only, without norms and softmax."""
    num_tokens, width = shape.num_tokens, shape.width
    embedding = shape.num_patches * shape.patch_dim * width
    projections = 4 * num_tokens * width**2  # q, k, v and the output projection
    attention = 2 * num_tokens**2 * width  # q k^T, and the weights times v
    mlp = 2 * num_tokens * width * shape.mlp_dim
    if shape.representation_size is None:
        head = shape.num_pooled * width * shape.num_classes
    else:
        head = shape.representation_size * (shape.num_pooled * width + shape.num_classes)
    return embedding + shape.depth * (projections + attention + mlp) + head


def train_flops(shape: Shape) -> int:
    """Return the operations of a training step per image.

    A multiply-add counts as two operations, and a backward pass as two forward passes.
    """
    return 3 * 2 * forward_macs(shape)
