"""Operations of a Vision Transformer in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vit_static.config.lora_schema import LoraConfig


@dataclass(frozen=True)
class Shape:
    """Dimensions that determine the number of operations per image.

    `num_tokens` counts the patches, the class token and the registers. The head reads `num_pooled` states of `width`
    each: one token or mean, or both side by side; or one state that a query attends to. The last block computes
    `num_read_tokens`, from the keys and values of all tokens; None: it computes all.
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
    num_read_tokens: int | None = None

    @property
    def num_last_tokens(self) -> int:
        """Number of tokens that the last block computes."""
        return self.num_tokens if self.num_read_tokens is None else self.num_read_tokens

    @property
    def with_all_tokens(self) -> Shape:
        """The same, with a last block that computes all tokens: the shape whose operations are published."""
        return replace(self, num_read_tokens=None)


def forward_macs(shape: Shape) -> int:
    """Return the multiply-adds of a forward pass per image: matrix products only, without norms and softmax."""
    num_tokens, width = shape.num_tokens, shape.width
    embedding = shape.num_patches * shape.patch_dim * width
    keys_and_values = 2 * num_tokens * width**2
    per_query = 2 * width**2  # q and the output projection
    per_query += 2 * num_tokens * width  # q k^T, and the weights times v
    per_query += shape.num_mlp_products * width * shape.mlp_dim
    blocks = shape.depth * keys_and_values + ((shape.depth - 1) * num_tokens + shape.num_last_tokens) * per_query
    pooling = keys_and_values + per_query if shape.pools_by_attention else 0
    if shape.representation_size is None:
        head = shape.num_pooled * width * shape.num_classes
    else:
        head = shape.representation_size * (shape.num_pooled * width + shape.num_classes)
    return embedding + blocks + pooling + head


def share_of_all_tokens(shape: Shape) -> float:
    """Return the forward pass's operations as a share of those with a last block that computes all tokens."""
    return forward_macs(shape) / forward_macs(shape.with_all_tokens)


def train_flops(shape: Shape, lora: LoraConfig | None = None) -> int:
    """Return the operations of a training step per image, for the patches that remain.

    A multiply-add counts as two operations, and a backward pass as two forward passes. With LoRA the adapters are
    counted too, and the backward pass without the gradients of frozen weights and of what is before the first adapter.
    """
    kept = shape.num_patches if shape.num_kept_patches is None else shape.num_kept_patches
    num_tokens = shape.num_tokens - shape.num_patches + kept
    shape = replace(shape, num_patches=kept, num_tokens=num_tokens)
    if lora is None or lora.rank == 0:
        return 3 * 2 * forward_macs(shape)
    return 2 * (forward_macs(shape) + _lora_macs(shape, lora))


def _lora_macs(shape: Shape, lora: LoraConfig) -> int:
    """Return the multiply-adds per image that LoRA adds to a forward pass: the adapters' and the backward pass's."""
    width = shape.width
    has_gradient, total = False, 0
    for num_queries in [shape.num_tokens] * (shape.depth - 1) + [shape.num_last_tokens]:
        has_gradient, macs = _lora_block_macs(shape, lora, num_queries, has_gradient)
        total += macs
    if shape.pools_by_attention:  # the query's gradient is computed, though it is frozen
        has_gradient, macs = _lora_block_macs(shape, lora, 1, has_gradient)
        total += macs
    layers = [(shape.num_pooled * width, shape.num_classes)]
    if shape.representation_size is not None:
        layers = [(layers[0][0], shape.representation_size), (shape.representation_size, shape.num_classes)]
    for inputs, outputs in layers:  # trained, without adapters
        total += inputs * outputs * (1 + has_gradient)
        has_gradient = True
    return total


def _lora_block_macs(shape: Shape, lora: LoraConfig, num_queries: int, has_gradient: bool) -> tuple[bool, int]:
    """Return `_lora_macs` of attention from `num_queries` tokens to all of them, and of the MLP after it.

    `has_gradient`: whether the input has one. The first result is whether the output has one.
    """
    width, total = shape.width, 0

    def layer(name: str, num_rows: int, inputs: int, outputs: int, needs: bool) -> bool:
        """Add a linear layer; return whether its output has a gradient."""
        nonlocal total
        total += num_rows * inputs * outputs * needs
        if name in lora.targets:  # forward; gradients of A, B, x A, and of x where it is needed
            total += num_rows * lora.rank * (inputs + outputs + inputs + 2 * outputs + inputs * needs)
        return needs or name in lora.targets

    q = layer("q", num_queries, width, width, has_gradient)
    k = layer("k", shape.num_tokens, width, width, has_gradient)
    v = layer("v", shape.num_tokens, width, width, has_gradient)
    total += num_queries * shape.num_tokens * width * (q + k + (q or k) + v)  # gradients of q, k, the weights and v
    attended = layer("proj", num_queries, width, width, q or k or v)
    attended = attended or has_gradient  # the residual connection
    hidden = False
    for _ in range(shape.num_mlp_products - 1):
        hidden = layer("mlp", num_queries, width, shape.mlp_dim, attended)
    out = layer("mlp", num_queries, shape.mlp_dim, width, hidden)
    return out or attended, total
