"""Layers that attention, MLPs and blocks share: dropout, stochastic depth, LayerScale, norms, linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Constant, Normal, XavierUniform

from vit_static.config.model_schema import ModelConfig

# (x, p, training=...) -> x with dropout applied; the signature of F.dropout's first arguments
DropoutFunction = Callable[..., paddle.Tensor]


class Dropout(nn.Layer):
    """Set each element to 0 with probability `p`, and scale the others by 1 / (1 - p).

    `function` draws the mask. program/seeded_dropout.py replaces it by one whose masks don't depend on the mesh, so
    every use of dropout in the model is a layer of its own.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.function: DropoutFunction = F.dropout

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.function(x, self.p, training=True) if self.p > 0.0 and self.training else x


class DropPath(nn.Layer):
    """Stochastic depth (arXiv 1603.09382): drop an image's residual branch with probability `p`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = Dropout(p)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.drop.p == 0.0 or not self.training:
            return x
        # One draw per image, by dropout applied to ones: `F.dropout(x, axis=0)` draws a tensor of computed shape,
        # which Paddle 3.3.1's auto-parallel passes refuse. Every rank creates the ones of the global batch and takes
        # its part of the result, so that an image's draw doesn't depend on the mesh.
        return x * self.drop(paddle.ones([x.shape[0], 1, 1], dtype=x.dtype))


class LayerScale(nn.Layer):
    """Learned factor per channel on a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = self.create_parameter([width], default_initializer=Constant(init))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * self.gamma


class RMSNorm(nn.Layer):
    """Divide by the root mean square over the last axis, and scale each channel (arXiv 1910.07467).

    The statistics are float32 for every dtype of input. Written out, because Paddle 3.3.1 has neither a CPU kernel nor
    a sharding rule for its `rms_norm`.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([width], default_initializer=Constant(1.0))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        in_float32 = to_dtype(x, paddle.float32)
        mean_square = (in_float32 * in_float32).mean(axis=-1, keepdim=True)
        return to_dtype(in_float32 * paddle.rsqrt(mean_square + self.epsilon), x.dtype) * self.weight


def make_norm(config: ModelConfig, width: int) -> nn.Layer:
    """Create the norm that the config names, over the last axis."""
    kind = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return kind(width, config.layer_norm_epsilon)


def to_dtype(x: paddle.Tensor, dtype: Any) -> paddle.Tensor:
    """Convert a tensor, or return it if it has the dtype."""
    return x if x.dtype == dtype else x.astype(dtype)


def linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    weight_init: Any = None,
    bias_init: float | Normal = 0.0,
) -> nn.Linear:
    """Create a linear layer. `weight_init` None means Xavier uniform."""
    return nn.Linear(
        in_features,
        out_features,
        weight_attr=paddle.ParamAttr(initializer=weight_init or XavierUniform()),
        bias_attr=paddle.ParamAttr(initializer=Constant(bias_init) if isinstance(bias_init, float) else bias_init)
        if bias
        else False,
    )
