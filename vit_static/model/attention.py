"""Multi-head attention, and the functions that compute it.

Shapes as in vit.py: B images, N tokens, C the width, H heads with d = C / H channels each.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import XavierUniform

from vit_static.config.model_schema import ModelConfig
from vit_static.model.draws import Draw
from vit_static.model.layers import Dropout, linear, make_norm
from vit_static.model.rope import RotaryPositions, rotate
from vit_static.model.variants import Variant

# (query, key, value [B, N, H, d], dropout of the attention weights) -> [B, N, H, d]
AttentionFunction = Callable[[paddle.Tensor, paddle.Tensor, paddle.Tensor, Dropout], paddle.Tensor]


def flash_attention(query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, dropout: Dropout) -> paddle.Tensor:
    """Apply FlashAttention 2 (arXiv 2307.08691), on a GPU and in half precision only. It draws its own masks.

    Calls the operator itself: `F.scaled_dot_product_attention` chooses a kernel by the dtype of its inputs before mixed
    precision converts them, and the one that it takes for float32 has no sharding rule, so its inputs are gathered.
    """
    p, is_causal, returns_weights = dropout.p, False, False
    out, *_ = paddle._C_ops.flash_attn(
        query, key, value, None, None, p, is_causal, returns_weights, not dropout.training, ""
    )
    return out


def attention_by_matmul(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    dropout: Callable[[paddle.Tensor], paddle.Tensor],
) -> paddle.Tensor:
    """Compute the same attention with separate matrix products; `dropout` is applied to the weights [B, H, N, N]."""
    query = query * query.shape[-1] ** -0.5
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))  # [B, H, N, d]
    return attention_of_heads(query, key, value, dropout).transpose([0, 2, 1, 3])  # [B, N, H, d]


def attention_of_heads(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    dropout: Callable[[paddle.Tensor], paddle.Tensor],
) -> paddle.Tensor:
    """Compute softmax(q k^T) v for heads [B, H, N, d] whose queries are scaled already; there may be fewer queries."""
    weights = F.softmax(paddle.matmul(query, key, transpose_y=True), axis=-1)  # [B, H, N, N]
    return paddle.matmul(dropout(weights), value)  # [B, H, N, d]


def with_positions(
    layer: nn.Layer,
    query: paddle.Tensor,
    key: paddle.Tensor,
    draw: Draw | None = None,
    tokens: slice | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Normalize and turn queries and keys [B, N, H, d] by a layer's `q_norm`, `k_norm` and `rope`, if it has them.

    The queries may be of only some of the `tokens`, [B, M, H, d].
    """
    if layer.q_norm is not None:
        query, key = layer.q_norm(query), layer.k_norm(key)
    if layer.rope is not None:
        rotation = layer.rope(draw)
        of_queries = rotation if tokens is None else (rotation[0][:, tokens], rotation[1][:, tokens])
        query, key = rotate(query, of_queries), rotate(key, rotation)
    return query, key


class Attention(nn.Layer):
    """Multi-head attention, [B, N, C] in, and out or [B, M, C] for M queries (appendix A of the paper).

    Queries and keys are normalized per head (`qk_norm`), then turned (`rope`). With `pools` it is the attention of a
    pooling head, which has neither.
    """

    def __init__(
        self, config: ModelConfig, variant: Variant, attention: AttentionFunction, *, pools: bool = False
    ) -> None:
        super().__init__()
        width = variant.width
        self.num_heads = variant.num_heads
        self.attention_drop = Dropout(0.0 if pools else config.attention_dropout)
        self.attention = attention
        # PLSC initializes q, k and v as one matrix of `width` rows and 3 * `width` columns: use the same limits here.
        fused = XavierUniform(fan_in=width, fan_out=3 * width)
        self.q = linear(width, width, bias=bool(config.qkv_bias), weight_init=fused)
        self.k = linear(width, width, bias=config.qkv_bias is True, weight_init=fused)
        self.v = linear(width, width, bias=bool(config.qkv_bias), weight_init=fused)
        self.proj = linear(width, width)
        self.proj_drop = Dropout(0.0 if pools else config.dropout)
        head_dim = width // variant.num_heads
        has_qk_norm = config.qk_norm and not pools
        self.q_norm = make_norm(config, head_dim) if has_qk_norm else None
        self.k_norm = make_norm(config, head_dim) if has_qk_norm else None
        self.norm = make_norm(config, width) if config.attention_norm and not pools else None
        self.rope = RotaryPositions(config, variant) if config.rope != "none" and not pools else None

    def split_heads(self, x: paddle.Tensor) -> paddle.Tensor:
        """Reshape [B, N, C] to [B, N, H, d]."""
        return x.reshape([0, 0, self.num_heads, x.shape[-1] // self.num_heads])

    def forward(
        self,
        x: paddle.Tensor,
        draw: Draw | None = None,
        queries: paddle.Tensor | None = None,
        tokens: slice | None = None,
    ) -> paddle.Tensor:
        """Attend to x [B, N, C] from all its tokens, or from `queries` [B, M, C], which may be these `tokens` of x."""
        query, key, value = self.q(x if queries is None else queries), self.k(x), self.v(x)
        query, key, value = self.split_heads(query), self.split_heads(key), self.split_heads(value)
        query, key = with_positions(self, query, key, draw, tokens)
        x = self.attention(query, key, value, self.attention_drop)  # [B, M, H, d]
        x = x.flatten(2)
        if self.norm is not None:
            x = self.norm(x)
        return self.proj_drop(self.proj(x))  # [B, M, C]
