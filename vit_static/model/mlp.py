"""MLP of a block."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Normal

from vit_static.config.schema import ModelConfig
from vit_static.model.layers import Dropout, linear
from vit_static.model.variants import Variant


class Mlp(nn.Layer):
    """Two linear layers with a GELU between them, [B, N, C] in and out."""

    def __init__(self, config: ModelConfig, variant: Variant) -> None:
        super().__init__()
        self.approximate = config.gelu == "tanh"
        self.fc1 = linear(variant.width, variant.mlp_dim, bias_init=Normal(0.0, 1e-6))
        self.fc2 = linear(variant.mlp_dim, variant.width, bias_init=Normal(0.0, 1e-6))
        self.drop1 = Dropout(config.dropout)
        self.drop2 = Dropout(config.dropout)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.drop1(F.gelu(self.fc1(x), self.approximate))  # [B, N, mlp_dim]
        return self.drop2(self.fc2(x))  # [B, N, C]
