"""The model as it is exported: what it computes, in the form that Paddle Inference runs quickest."""

from __future__ import annotations

import copy

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.config.schema import InferencePrecision
from vit_static.model.vit import Attention, Block, VisionTransformer, attend

_PARTS = ("q", "k", "v")


class InferenceModel(nn.Layer):
    """Images [B, 3, height, width] float32 to logits [B, num_classes] and features [B, C], both float32: those of
    `model`, whose weights these are copies of, as if in evaluation.

    Queries, keys and values are one product, and where the head reads the class token alone, the last block computes
    nothing else than it. In bfloat16 and float16 weights and activations are that, the norms' factors and all after the
    last block float32. Parameters have the names of PLSC's and timm's (`blocks.0.attn.qkv.weight`), by which
    `predict.load_model` finds them again.
    """

    def __init__(self, model: VisionTransformer, dtype: InferencePrecision = "float32") -> None:
        super().__init__()
        self.dtype, self.low = dtype, dtype != "float32"
        self.body = copy.deepcopy(model)
        for block in self.body.blocks:
            block.attn = _Attention(block.attn)
        self.body.eval()
        if self.low:
            self.body.to(dtype=dtype)
            for layer in self.body.sublayers():
                if isinstance(layer, nn.LayerNorm):
                    layer.to(dtype="float32")
        for name, parameter in self.body.named_parameters():
            parameter.name = name

    def forward(self, images: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        body = self.body
        x = body.embed(images.astype(self.dtype))  # [B, N, C]
        last = len(body.blocks) - 1
        for index, block in enumerate(body.blocks):
            reads_one = index == last and body.pool == "cls"
            x = _through(block, x, body.num_prefix_tokens - 1 if reads_one else None)
        x = x.astype("float32")
        if body.pool == "cls":
            features = body.norm(x[:, 0])
        else:
            features = body.norm(body.pool_tokens(x)) if body.fc_norm else body.pool_tokens(body.norm(x))
        representation = features
        if body.head0 is not None:
            representation = F.tanh(self._in_float32(body.head0, representation))
        return self._in_float32(body.head, representation), features

    def _in_float32(self, layer: nn.Linear, x: paddle.Tensor) -> paddle.Tensor:
        if not self.low:
            return layer(x)
        return F.linear(x, layer.weight.astype("float32"), layer.bias.astype("float32"))


def _through(block: Block, x: paddle.Tensor, only: int | None) -> paddle.Tensor:
    """A block's tokens [B, N, C]; `only`: of this one alone, [B, 1, C]."""
    attended = block.attn(block.norm1(x), only)
    x = block.ls1(attended) + (x if only is None else x[:, only : only + 1])
    return block.ls2(block.mlp(block.norm2(x))) + x


class _Attention(nn.Layer):
    """Self-attention with its three projections as one."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.width = attention.q.weight.shape[1]
        parts = [getattr(attention, name) for name in _PARTS]
        has_bias = attention.q.bias is not None
        self.qkv = nn.Linear(self.width, 3 * self.width, bias_attr=None if has_bias else False)
        self.qkv.weight.set_value(paddle.concat([part.weight for part in parts], axis=1))
        if has_bias:
            self.qkv.bias.set_value(paddle.concat([part.bias for part in parts]))
        self.attention_drop = attention.attention_drop
        self.proj = attention.proj

    def forward(self, x: paddle.Tensor, only: int | None) -> paddle.Tensor:
        """Of tokens [B, N, C] all, or `only` one, [B, 1, C]."""
        width = self.width
        qkv = self.qkv(x)
        query, key, value = (qkv[:, :, part * width : (part + 1) * width] for part in range(3))
        if only is not None:
            query = query[:, only : only + 1]
        query, key, value = (
            part.reshape([0, 0, self.num_heads, width // self.num_heads]).transpose([0, 2, 1, 3])
            for part in (query, key, value)
        )  # [B, H, N, d]
        # Scaled after the transposition, and `reshape` instead of `flatten`: Paddle Inference's passes fuse only this
        # sequence into the matrix products.
        query = query * (width // self.num_heads) ** -0.5
        x = attend(query, key, value, self.attention_drop).transpose([0, 2, 1, 3])  # [B, N, H, d]
        return self.proj(x.reshape([0, 0, width]))
