"""Attention pooling: a learned query reads all tokens (MAP head of arXiv 2106.04560; SigLIP, arXiv 2303.15343)."""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn.initializer import XavierUniform

from vit_static.config.model_schema import ModelConfig
from vit_static.model.attention import Attention, AttentionFunction
from vit_static.model.layers import make_norm
from vit_static.model.mlp import Mlp
from vit_static.model.variants import Variant


class AttentionPool(nn.Layer):
    """Tokens [B, N, C] to one state [B, C]: attention of one learned query, then a residual MLP like a block's."""

    def __init__(self, config: ModelConfig, variant: Variant, attention: AttentionFunction) -> None:
        super().__init__()
        without_dropout = config.model_copy(update={"dropout": 0.0})
        start = XavierUniform(fan_in=1, fan_out=variant.width)
        self.latent = self.create_parameter([1, 1, variant.width], default_initializer=start)
        self.attn = Attention(config, variant, attention, pools=True)
        self.norm = make_norm(config, variant.width)
        self.mlp = Mlp(without_dropout, variant)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        # A broadcast sum and not `expand`, as for the tokens before the patches (vit.py).
        queries = paddle.zeros_like(x[:, :1]) + self.latent  # [B, 1, C]
        x = self.attn(x, queries=queries)
        x = x + self.mlp(self.norm(x))  # [B, 1, C]
        return x.flatten(1)
