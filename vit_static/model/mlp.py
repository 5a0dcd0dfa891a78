"""MLP of a block."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Normal

from vit_static.config.model_schema import ModelConfig
from vit_static.model.layers import Dropout, linear, make_norm
from vit_static.model.variants import Variant


class Mlp(nn.Layer):
    """Two linear layers with an activation between them, [B, N, C] in and out.

    With `mlp: swiglu` the hidden layer is silu(gate(x)) * fc1(x) (arXiv 2002.05202). With `mlp_norm` it is normalized.
    """

    def __init__(self, config: ModelConfig, variant: Variant) -> None:
        super().__init__()
        self.activation = config.gelu
        self.gate = None
        self.fc1 = linear(variant.width, variant.mlp_dim, bias_init=Normal(0.0, 1e-6))
        self.fc2 = linear(variant.mlp_dim, variant.width, bias_init=Normal(0.0, 1e-6))
        if config.mlp == "swiglu":
            self.gate = linear(variant.width, variant.mlp_dim, bias_init=Normal(0.0, 1e-6))
        self.norm = make_norm(config, variant.mlp_dim) if config.mlp_norm else None
        self.drop1 = Dropout(config.dropout)
        self.drop2 = Dropout(config.dropout)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        hidden = self.fc1(x)  # [B, N, mlp_dim]
        if self.gate is not None:
            gate = self.gate(x)
            # One operator, which keeps less for the backward pass, but which can't be exported to ONNX.
            hidden = F.swiglu(gate, hidden) if self.training else F.silu(gate) * hidden
        elif self.activation == "quick":
            hidden = hidden * F.sigmoid(1.702 * hidden)
        else:
            hidden = F.gelu(hidden, self.activation == "tanh")
        hidden = self.drop1(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.drop2(self.fc2(hidden))  # [B, N, C]
