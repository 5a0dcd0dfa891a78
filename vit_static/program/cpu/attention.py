"""Fused attention and its gradient on oneDNN's CPU kernels, tile by tile, so that the scores of the whole batch are
never stored. lowering.py (fuse_attention) puts them into a program. For float32 attention_float32.py has faster ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from vit_static.program.cpu.attention_float32 import Float32Attention, Float32AttentionGrad, is_supported
from vit_static.program.cpu.onednn import Layout, Primitive, dense
from vit_static.program.cpu.primitives import matmul, softmax, softmax_grad
from vit_static.program.cpu.scratch import scratch_memory

_SCORE_BYTES = 4 << 20  # scores that are computed at a time, so that they stay in the cores' caches


def attention(q: Layout, k: Layout, v: Layout, out: Layout, factor: float = 1.0) -> Callable[..., None]:
    """Return the fastest kernel of softmax(q k^T) v, times a factor, on [B, H, N, d]. Operands: q, k, v, out."""
    kind = Float32Attention if is_supported(q, out) else Attention
    return kind(q, k, v, out, factor)


def attention_grad(inputs: Sequence[Layout], grads: Sequence[Layout], factors: Sequence[float]) -> Callable[..., None]:
    """Return the fastest kernel of the gradients of q, k and v, each multiplied by its factor.

    `inputs` and operands: q, k, v, the gradient of out, and out if `is_supported` with both; then the gradients.
    """
    kind = Float32AttentionGrad if is_supported(inputs[0], inputs[3]) else AttentionGrad
    return kind(inputs, grads, factors)


class Attention:
    """The kernel of softmax(q k^T) v, times a factor, on [B, H, N, d], for a few images and heads at a time.

    Call it with the addresses of q, k, v and out. Scores are float32, attention weights have the operands' dtype.
    """

    def __init__(self, q: Layout, k: Layout, v: Layout, out: Layout, factor: float = 1.0) -> None:
        self._operands = (q, k, v, out)
        self._tile = _Tile(q, k)
        q, k, v, out = (layout.first(*self._tile.lengths) for layout in self._operands)
        self._scores, self._softmax = self._tile.score_kernels(q, k)
        self._weighted_sum = matmul(self._tile.weights, v, out, factor=factor)

    def __call__(self, *addresses: int) -> None:
        scores, weights, _ = self._tile.buffers()
        for q, k, v, out in self._tile.tiles(self._operands, addresses):
            self._scores(q, k, scores)
            self._softmax(scores, weights)
            self._weighted_sum(weights, v, out)


class AttentionGrad:
    """The kernel of the gradients of `Attention`, which recomputes the attention weights.

    Call it with the addresses of q, k, v and the gradient of out, then of the gradients of q, k and v, which it writes,
    each multiplied by its factor.
    """

    def __init__(self, inputs: Sequence[Layout], grads: Sequence[Layout], factors: Sequence[float]) -> None:
        self._operands = (*inputs, *grads)
        self._tile = _Tile(inputs[0], inputs[1])
        q, k, v, out_grad, *grads = (layout.first(*self._tile.lengths) for layout in self._operands)
        weights = self._tile.weights
        self._scores, self._softmax = self._tile.score_kernels(q, k)
        self._weights_grad = matmul(out_grad, v.transposed, weights)
        self._scores_grad = softmax_grad(weights, weights, weights)
        self._q_grad = matmul(weights, k, grads[0], factor=factors[0])
        self._k_grad = matmul(weights.transposed, q, grads[1], factor=factors[1])
        self._v_grad = matmul(weights.transposed, out_grad, grads[2], factor=factors[2])

    def __call__(self, *addresses: int) -> None:
        scores, weights, grad = self._tile.buffers()
        for q, k, v, out_grad, q_grad, k_grad, v_grad in self._tile.tiles(self._operands, addresses):
            self._scores(q, k, scores)
            self._softmax(scores, weights)
            self._v_grad(weights, out_grad, v_grad)
            self._weights_grad(out_grad, v, grad)
            self._scores_grad(weights, grad, grad)
            self._q_grad(grad, k, q_grad)
            self._k_grad(grad, q, k_grad)


class _Tile:
    """The number of images and heads that are computed at a time, and the buffers for their scores."""

    def __init__(self, q: Layout, k: Layout) -> None:
        self._num_images, self._num_heads, num_queries, _ = q.shape
        num_keys = k.shape[2]
        num_matrices = max(_SCORE_BYTES // (4 * num_queries * num_keys), 1)
        self.lengths = (
            _largest_divisor(self._num_images, num_matrices // self._num_heads),
            _largest_divisor(self._num_heads, num_matrices),
        )
        self._scores = dense("float32", *self.lengths, num_queries, num_keys)
        self.weights = dense(q.dtype, *self.lengths, num_queries, num_keys)

    def score_kernels(self, q: Layout, k: Layout) -> tuple[Primitive, Primitive]:
        return matmul(q, k.transposed, self._scores), softmax(self._scores, self.weights)

    def buffers(self) -> tuple[int, int, int]:
        """Return the addresses of the scores, the attention weights, and the gradients of either."""
        num_bytes = math.prod(self._scores.shape) * 4
        (scores,) = scratch_memory(3 * num_bytes)
        return scores, scores if self.weights.dtype == "float32" else scores + num_bytes, scores + 2 * num_bytes

    def tiles(self, layouts: Sequence[Layout], addresses: Sequence[int]) -> Iterator[list[int]]:
        """Yield the operands' addresses in each tile of the batch."""
        for image in range(0, self._num_images, self.lengths[0]):
            for head in range(0, self._num_heads, self.lengths[1]):
                yield [address + layout.offset(image, head) for layout, address in zip(layouts, addresses, strict=True)]


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`, at least 1."""
    return max(divisor for divisor in range(1, max(limit, 1) + 1) if number % divisor == 0)
