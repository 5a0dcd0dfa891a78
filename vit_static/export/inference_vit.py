"""The model in the form that Paddle Inference runs fastest."""

from __future__ import annotations

import copy

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.config.schema import InferencePrecision
from vit_static.model.attention import Attention, attention_of_heads, with_positions
from vit_static.model.draws import Draw
from vit_static.model.layers import RMSNorm
from vit_static.model.rope import RotaryPositions
from vit_static.model.vit import VisionTransformer


class InferenceModel(nn.Layer):
    """Images [B, 3, height, width] float32 to the logits [B, num_classes] and features [B, C] of a model in evaluation.

    A model without a head has the features as its only output. All outputs are float32. The weights are copies of the
    model's. Queries, keys and values come from one matrix product. In bfloat16 and float16, weights and activations
    have that type, except for the norms' parameters, rotary positions and everything after the last block but attention
    pooling, which stay float32. Parameters have the names of PLSC and timm (`blocks.0.attn.qkv.weight`), by which
    `attention_maps.load_as_layer` identifies them.
    """

    def __init__(self, model: VisionTransformer, dtype: InferencePrecision = "float32") -> None:
        super().__init__()
        self.dtype, self.is_low_precision = dtype, dtype != "float32"
        self.backbone = copy.deepcopy(model)
        for block in self.backbone.blocks:
            block.attn = _FusedQkvAttention(block.attn)
        self.backbone.eval()
        if self.is_low_precision:
            rotary = [layer for layer in self.backbone.sublayers() if isinstance(layer, RotaryPositions)]
            exact = [[tensor.clone() for tensor in (*layer.parameters(), *layer.buffers())] for layer in rotary]
            self.backbone.to(dtype=dtype)
            for layer in self.backbone.sublayers():
                if isinstance(layer, nn.LayerNorm | RMSNorm | RotaryPositions):
                    layer.to(dtype="float32")
            for layer, tensors in zip(rotary, exact, strict=True):  # angles that were rounded would be other positions
                for rounded, tensor in zip((*layer.parameters(), *layer.buffers()), tensors, strict=True):
                    rounded.set_value(tensor)
        for name, parameter in self.backbone.named_parameters():
            parameter.name = name

    def forward(self, images: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        backbone = self.backbone
        x = backbone.encode(images.astype(self.dtype)).astype("float32")
        features = backbone.norm(self._pool(x)) if backbone.fc_norm else self._pool(backbone.norm(x))
        if backbone.head is None:
            return (features,)
        if backbone.head_dist is not None:
            class_token, distillation_token = backbone.split_features(features)
            logits = self._in_float32(backbone.head, class_token)
            return (logits + self._in_float32(backbone.head_dist, distillation_token)) / 2.0, features
        representation = features
        if backbone.head0 is not None:
            representation = F.tanh(self._in_float32(backbone.head0, representation))
        return self._in_float32(backbone.head, representation), features

    def _pool(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.backbone.attn_pool is not None:
            x = x.astype(self.dtype)
        return self.backbone.pool_tokens(x).astype("float32")

    def _in_float32(self, layer: nn.Linear, x: paddle.Tensor) -> paddle.Tensor:
        if not self.is_low_precision:
            return layer(x)
        return F.linear(x, layer.weight.astype("float32"), layer.bias.astype("float32"))


class _FusedQkvAttention(nn.Layer):
    """Self-attention of `Attention` whose query, key and value projections are one linear layer."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.width = attention.q.weight.shape[1]
        projections = [attention.q, attention.k, attention.v]
        has_bias = attention.q.bias is not None
        self.qkv = nn.Linear(self.width, 3 * self.width, bias_attr=None if has_bias else False)
        self.qkv.weight.set_value(paddle.concat([projection.weight for projection in projections], axis=1))
        if has_bias:
            no_bias = paddle.zeros([self.width])  # of keys, with `qkv_bias: qv`
            biases = [no_bias if projection.bias is None else projection.bias for projection in projections]
            self.qkv.bias.set_value(paddle.concat(biases))
        self.attention_drop = attention.attention_drop
        self.norm, self.proj = attention.norm, attention.proj
        self.q_norm, self.k_norm, self.rope = attention.q_norm, attention.k_norm, attention.rope

    def forward(
        self, x: paddle.Tensor, draw: Draw | None, queries: paddle.Tensor | None, tokens: slice | None
    ) -> paddle.Tensor:
        """Return the output for all tokens [B, N, C], or for some of them only, such as [B, 1, C].

        The one product has the queries of all tokens, so `queries` isn't read, nor then computed by the program.
        """
        assert draw is None, "draws are for training and for images of other sizes"
        width, heads = self.width, [0, 0, self.num_heads, self.width // self.num_heads]
        qkv = self.qkv(x)
        query, key, value = (qkv[:, :, index * width : (index + 1) * width] for index in range(3))
        query = query if tokens is None else query[:, tokens]
        has_positions = self.q_norm is not None or self.rope is not None
        if has_positions:
            query, key = with_positions(self, query.reshape(heads), key.reshape(heads), draw, tokens)  # [B, N, H, d]
        query, key, value = (
            (part if has_positions and part is not value else part.reshape(heads)).transpose([0, 2, 1, 3])
            for part in (query, key, value)
        )  # [B, H, N, d]
        # Scaled after the transposition, and `reshape` instead of `flatten`: Paddle Inference's passes fuse only this
        # sequence into the matrix products.
        query = query * (width // self.num_heads) ** -0.5
        x = attention_of_heads(query, key, value, self.attention_drop).transpose([0, 2, 1, 3])  # [B, N, H, d]
        x = x.reshape([0, 0, width])
        return self.proj(x if self.norm is None else self.norm(x))
