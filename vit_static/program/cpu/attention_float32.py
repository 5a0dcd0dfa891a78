"""Fused attention and its gradient in float32: exponentials without their maximum, normalized after the sums.

softmax(s) is exp(s) / sum(exp(s)). As a rule all of a tile's exponentials can be represented: then no pass looks for
maxima, and the division is one of the result's rows, which have d columns instead of one per key. If a row's sum leaves
the range in which float32 is precise, the tile's softmax is computed with maxima. Softmax's gradient needs the sum of
weights * weights_grad over the keys: that is the sum of out * out_grad over the channels (Dao et al. 2022,
FlashAttention, appendix B.2), so the gradient is one pass over the scores.

Scores are [images, queries, heads, keys] in memory. So their rows are in the order of those of q and out, which are
[B, N, H, d], and a factor per row is one column: oneDNN 3.6 has fast kernels for this, and slow ones for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from vit_static.program.cpu.elementwise import chain
from vit_static.program.cpu.mklml import exponential
from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.cpu.primitives import MAX_PRIMITIVES, matmul, multiply, softmax
from vit_static.program.cpu.scratch import scratch_memory

_SCORE_BYTES = 4 << 20  # scores that are computed at a time, so that they stay in the cores' caches
_LEAST_SUM, _GREATEST_SUM = 1e-18, 1e18  # of a row's exponentials; gradients are divided by it


def is_supported(q: Layout, *outs: Layout) -> bool:
    """Return whether these kernels compute attention with queries q and a result, or its gradient, as `outs`."""
    return all(q.dtype == out.dtype == "float32" and _is_matrix(out) for out in outs)


class Float32Attention:
    """The kernel of softmax(q k^T) v, times a factor, on [B, H, N, d]. Call it with the addresses of q, k, v and out.

    There may be fewer queries than keys.
    """

    def __init__(self, q: Layout, k: Layout, v: Layout, out: Layout, factor: float = 1.0) -> None:
        self._by_query, self._by_key = (q, out), (k, v)
        self._tiles = [
            (tile, _forward(tile.queries_of(q), tile.keys_of(k), tile.keys_of(v), tile.queries_of(out), factor))
            for tile in _tiles(q, k)
        ]

    def __call__(self, q: int, k: int, v: int, out: int) -> None:
        for tile, kernel in self._tiles:
            kernel(*tile.query_addresses(self._by_query, (q, out)), *tile.key_addresses(self._by_key, (k, v)))


class Float32AttentionGrad:
    """The kernel of the gradients of `Float32Attention`, which recomputes the attention weights.

    Call it with the addresses of q, k, v, the gradient of out, and out if `inputs` has a fifth layout (else it is
    recomputed), then of the gradients of q, k and v, which it writes, each multiplied by its factor.
    """

    def __init__(self, inputs: Sequence[Layout], grads: Sequence[Layout], factors: Sequence[float]) -> None:
        q, k, v, out_grad, *out = inputs
        self._by_query = (q, out_grad, grads[0], *out)
        self._by_key = (k, v, grads[1], grads[2])
        self._tiles = [
            (
                tile,
                _backward(
                    tuple(tile.queries_of(layout) for layout in self._by_query[:3]),
                    tuple(tile.keys_of(layout) for layout in self._by_key),
                    bool(out),
                    tuple(factors),
                    tile.first_query > 0,
                ),
            )
            for tile in _tiles(q, k, splits_images=tuple(factors[1:]) == (1.0, 1.0))
        ]

    def __call__(self, q: int, k: int, v: int, out_grad: int, *others: int) -> None:
        *out, q_grad, k_grad, v_grad = others
        for tile, kernel in self._tiles:
            by_key = tile.key_addresses(self._by_key, (k, v, k_grad, v_grad))
            kernel(by_key, *tile.query_addresses(self._by_query, (q, out_grad, q_grad, *out)))


# -- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """Images and queries whose scores, of all heads and keys, are computed at a time."""

    first_image: int
    num_images: int
    first_query: int
    num_queries: int

    def queries_of(self, layout: Layout) -> Layout:
        _, num_heads, _, channels = layout.shape
        return Layout(layout.dtype, (self.num_images, num_heads, self.num_queries, channels), layout.strides)

    def keys_of(self, layout: Layout) -> Layout:
        return layout.first(self.num_images)

    def query_addresses(self, layouts: Sequence[Layout], addresses: Sequence[int]) -> list[int]:
        start = (self.first_image, 0, self.first_query)
        return [address + layout.offset(*start) for layout, address in zip(layouts, addresses, strict=True)]

    def key_addresses(self, layouts: Sequence[Layout], addresses: Sequence[int]) -> list[int]:
        return [address + layout.offset(self.first_image) for layout, address in zip(layouts, addresses, strict=True)]


def _tiles(q: Layout, k: Layout, splits_images: bool = True) -> list[_Tile]:
    """Return the tiles of attention with these queries and keys: whole images, or parts of an image's queries.

    `splits_images`: False where parts can't be added up, as multiplied gradients of keys (`matmul`).
    """
    num_images, num_heads, num_queries, _ = q.shape
    query_bytes = 4 * num_heads * k.shape[2]
    num_parts = -(-query_bytes * num_queries // _SCORE_BYTES) if splits_images else 1
    part = -(-num_queries // min(num_parts, num_queries))
    together = max(_SCORE_BYTES // (query_bytes * num_queries), 1)
    return [
        _Tile(image, min(together, num_images - image), query, min(part, num_queries - query))
        for image in range(0, num_images, together)
        for query in range(0, num_queries, part)
    ]


# -- kernels of a tile -----------------------------------------------------------------------------------------------


def _is_matrix(layout: Layout) -> bool:
    """Return whether [B, H, N, d] is a contiguous matrix [B * N * H, d] in memory."""
    by_token = layout.permuted((0, 2, 1, 3))
    return by_token == dense(layout.dtype, *by_token.shape)


@cache
def _constants(value: float, length: int) -> np.ndarray:
    return np.full(length, value, np.float32)


class _Weights:
    """Attention weights of a tile, not divided by their sums, and the reciprocals of the sums."""

    def __init__(self, q: Layout, k: Layout) -> None:
        num_images, num_heads, num_queries, _ = q.shape
        num_keys, num_rows = k.shape[2], num_images * num_heads * num_queries
        self.scores = dense("float32", num_images, num_queries, num_heads, num_keys).permuted((0, 2, 1, 3))
        self.rows, self.column = dense("float32", num_rows, num_keys), dense("float32", num_rows, 1)
        self._product = matmul(q, k.transposed, self.scores)
        self._exponential = exponential(num_rows * num_keys)
        self._sum = matmul(self.rows, dense("float32", num_keys, 1), self.column)
        self._softmax = softmax(self.rows, self.rows)
        self._ones = _constants(1.0, num_keys)
        self._sums = np.empty(num_rows, np.float32)
        self.reciprocals: int = self._sums.ctypes.data  # address

    @property
    def num_bytes(self) -> int:
        return 4 * self.rows.shape[0] * self.rows.shape[1]

    def __call__(self, q: int, k: int, out: int) -> None:
        self._product(q, k, out)
        self._exponential(out, out)
        self._sum(out, self._ones.ctypes.data, self.reciprocals)
        if self._sums.min() > _LEAST_SUM and self._sums.max() < _GREATEST_SUM:
            np.reciprocal(self._sums, out=self._sums)
        else:  # also if a score isn't finite
            self._product(q, k, out)
            self._softmax(out, out)
            self._sums.fill(1.0)


class _Forward:
    def __init__(self, q: Layout, k: Layout, v: Layout, out: Layout, factor: float) -> None:
        self._weights = _weights(q, k)
        self._product = matmul(self._weights.scores, v, out, factor=factor)
        rows = dense("float32", self._weights.rows.shape[0], out.shape[3])
        self._divide = multiply(rows, self._weights.column, rows)

    def __call__(self, q: int, out: int, k: int, v: int) -> None:
        (weights,) = scratch_memory(self._weights.num_bytes)
        self._weights(q, k, weights)
        self._product(weights, v, out)
        self._divide(out, self._weights.reciprocals, out)


class _Backward:
    def __init__(
        self,
        by_query: tuple[Layout, ...],
        by_key: tuple[Layout, ...],
        has_out: bool,
        factors: tuple[float, ...],
        accumulate: bool,
    ) -> None:
        (q, _, q_grad), (k, v, k_grad, v_grad) = by_query, by_key
        self._weights = _weights(q, k)
        scores, scores_rows, column = self._weights.scores, self._weights.rows, self._weights.column
        num_images, num_heads, num_queries, channels = q.shape
        compact = dense("float32", num_images, num_queries, num_heads, channels).permuted((0, 2, 1, 3))
        rows = dense("float32", column.shape[0], channels)
        self._row_bytes = 4 * column.shape[0] * channels
        self._divide = multiply(rows, column, rows)
        self._multiply = multiply(rows, rows, rows)
        self._out = None if has_out else matmul(scores, v, compact)
        self._negative_sum = matmul(rows, dense("float32", channels, 1), column)
        self._negative_ones = _constants(-1.0, channels)
        self._negative_sums = np.empty(column.shape[0], np.float32)
        self._weights_grad = matmul(compact, v.transposed, scores)
        self._scores_grad = chain("add", scores_rows, column, [("multiply", scores_rows)])
        self._q_grad = matmul(scores, k, q_grad, factor=factors[0])
        self._k_grad = matmul(scores.transposed, q, k_grad, factor=factors[1], accumulate=accumulate)
        self._v_grad = matmul(scores.transposed, compact, v_grad, factor=factors[2], accumulate=accumulate)

    def __call__(self, by_key: Sequence[int], q: int, out_grad: int, q_grad: int, out: int = 0) -> None:
        k, v, k_grad, v_grad = by_key
        num_bytes = self._weights.num_bytes
        weights, grad, divided, product = scratch_memory(num_bytes, num_bytes, self._row_bytes, self._row_bytes)
        reciprocals, sums = self._weights.reciprocals, self._negative_sums.ctypes.data
        self._weights(q, k, weights)
        self._divide(out_grad, reciprocals, divided)
        self._v_grad(weights, divided, v_grad)
        if self._out is not None:
            self._out(weights, v, product)
            self._divide(product, reciprocals, product)
            out = product
        self._multiply(divided, out, product)
        self._negative_sum(product, self._negative_ones.ctypes.data, sums)
        self._weights_grad(divided, v, grad)
        self._scores_grad(grad, sums, weights, grad)
        self._q_grad(grad, k, q_grad)
        self._k_grad(grad, q, k_grad)


# Kernels run one at a time, so blocks of equal shapes share them.
_weights = lru_cache(MAX_PRIMITIVES)(_Weights)
_forward = lru_cache(MAX_PRIMITIVES)(_Forward)
_backward = lru_cache(MAX_PRIMITIVES)(_Backward)
