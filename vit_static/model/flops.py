"""Operations and parameters of a ViT in closed form, and the peak rates of known cards."""

from __future__ import annotations

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
