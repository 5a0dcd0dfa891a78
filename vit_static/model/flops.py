"""Operations of a Vision Transformer in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Dimensions that determine the number of operations per image.

    `num_tokens` counts the patches, the class token and the registers. The head reads `num_pooled` states of `width`
    each: one token or mean, or both side by side; or one state that a query attends to.
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
    num_kept_patches: int | None = None  # in training, if patches are left out
    num_mlp_products: int = 2
    pools_by_attention: bool = False


def forward_macs(shape: Shape) -> int:
    """Return the multiply-adds of a forward pass per image: matrix products only, without norms and softmax."""
    num_tokens, width = shape.num_tokens, shape.width
    embedding = shape.num_patches * shape.patch_dim * width
    projections = 4 * num_tokens * width**2  # q, k, v and the output projection
    attention = 2 * num_tokens**2 * width  # q k^T, and the weights times v
    mlp = shape.num_mlp_products * width * shape.mlp_dim  # per token
    pooling = 0
    if shape.pools_by_attention:  # one query: k and v of all tokens, the rest of one
        pooling = 2 * num_tokens * width**2 + 2 * width**2 + 2 * num_tokens * width + mlp
    if shape.representation_size is None:
        head = shape.num_pooled * width * shape.num_classes
    else:
        head = shape.representation_size * (shape.num_pooled * width + shape.num_classes)
    return embedding + shape.depth * (projections + attention + num_tokens * mlp) + pooling + head


def train_flops(shape: Shape) -> int:
    """Return the operations of a training step per image, for the patches that remain.

    A multiply-add counts as two operations, and a backward pass as two forward passes.
    """
    kept = shape.num_patches if shape.num_kept_patches is None else shape.num_kept_patches
    num_tokens = shape.num_tokens - shape.num_patches + kept
    return 3 * 2 * forward_macs(replace(shape, num_patches=kept, num_tokens=num_tokens))
