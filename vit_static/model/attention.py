"""Multi-head attention, and the functions that compute it.

Shapes as in vit.py: B images, N tokens, C the width, H heads with d = C / H channels each.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import XavierUniform

from vit_static.config.schema import ModelConfig
from vit_static.model.layers import Dropout, linear
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


class Attention(nn.Layer):
    """Multi-head self-attention, [B, N, C] in and out (appendix A of the paper)."""

    def __init__(self, config: ModelConfig, variant: Variant, attention: AttentionFunction) -> None:
        super().__init__()
        width = variant.width
        self.num_heads = variant.num_heads
        self.attention_drop = Dropout(config.attention_dropout)
        self.attention = attention
        # PLSC initializes q, k and v as one matrix of `width` rows and 3 * `width` columns: use the same limits here.
        fused = XavierUniform(fan_in=width, fan_out=3 * width)
        self.q = linear(width, width, bias=config.qkv_bias, weight_init=fused)
        self.k = linear(width, width, bias=config.qkv_bias, weight_init=fused)
        self.v = linear(width, width, bias=config.qkv_bias, weight_init=fused)
        self.proj = linear(width, width)
        self.proj_drop = Dropout(config.dropout)

    def split_heads(self, x: paddle.Tensor) -> paddle.Tensor:
        """Reshape [B, N, C] to [B, N, H, d]."""
        return x.reshape([0, 0, self.num_heads, x.shape[-1] // self.num_heads])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        query, key, value = self.split_heads(self.q(x)), self.split_heads(self.k(x)), self.split_heads(self.v(x))
        x = self.attention(query, key, value, self.attention_drop)  # [B, N, H, d]
        return self.proj_drop(self.proj(x.flatten(2)))  # [B, N, C]
