"""The Vision Transformer (Dosovitskiy et al., arXiv 2010.11929): architecture, variants, position embeddings.

The layers know nothing of precision, meshes, checkpoints or files. Shapes in the trailing comments:
B images, N tokens (patches, and the class token if there is one), C the width, H heads of d = C / H channels.

In memory the query, key and value projections are three layers, so that tensor parallelism can split each of
them by heads without moving anything. In files they are one matrix, ``attn.qkv``, as PLSC and timm have it:
`formats.fuse_qkv` and `split_qkv` go from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Assign, Constant, Normal, XavierUniform

from vit_static.config.schema import ModelConfig
from vit_static.model.pos_embed import sincos2d_pos_embed
from vit_static.model.variants import variant_of

# F.dropout's first arguments and `training`
DropoutFunction = Callable[..., paddle.Tensor]


class Dropout(nn.Layer):
    """Sets elements to 0 with probability `p`, and scales the others by 1 / (1 - p).

    `function` draws the mask; step.py puts one in F.dropout's place whose masks follow the mesh. Each use of dropout is
    a layer of its own.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.function: DropoutFunction = F.dropout

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.function(x, self.p, training=True) if self.p > 0.0 and self.training else x


# (query, key, value [B, N, H, d], the dropout of the attention's weights) -> [B, N, H, d]
AttentionFunction = Callable[[paddle.Tensor, paddle.Tensor, paddle.Tensor, Dropout], paddle.Tensor]


def flash_attention(query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, dropout: Dropout) -> paddle.Tensor:
    """Paddle's fused attention: FlashAttention on a card, plain products on a CPU. Draws its own masks."""
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout.p, training=dropout.training)


def attention_by_matmul(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, dropout: Dropout
) -> paddle.Tensor:
    """The same attention in plain products, its masks drawn by `dropout`."""
    query = query * query.shape[-1] ** -0.5
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))  # [B, H, N, d]
    scores = paddle.matmul(query, key, transpose_y=True)  # [B, H, N, N]
    out = paddle.matmul(dropout(F.softmax(scores, axis=-1)), value)  # [B, H, N, d]
    return out.transpose([0, 2, 1, 3])  # [B, N, H, d]


def patches(images: paddle.Tensor, patch_size: int) -> paddle.Tensor:
    """Images [B, 3, height, width] cut into [B, rows * columns, 3 * patch_size**2], row by row."""
    channels, height, width = images.shape[1:]
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape([0, channels, rows, patch_size, columns, patch_size])
    x = x.transpose([0, 2, 4, 1, 3, 5])  # [B, rows, columns, 3, patch, patch]
    return x.reshape([0, rows * columns, channels * patch_size**2])


class PatchProjection(nn.Layer):
    """The patch embedding's weights in a convolution's layout; the convolution itself as one matrix product.

    Stride and kernel are equal, so the two are the same sums; the product is quicker and can be sharded.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        fan_in = 3 * patch_size**2
        self.weight = self.create_parameter(
            [width, 3, patch_size, patch_size], default_initializer=Normal(0.0, math.sqrt(2.0 / fan_in))
        )
        self.bias = self.create_parameter([width], is_bias=True)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        kernel = self.weight.reshape([self.weight.shape[0], -1])  # [C, 3 * patch**2]
        return paddle.matmul(x, kernel, transpose_y=True) + self.bias  # [B, N, C]


class PatchEmbed(nn.Layer):
    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(patch_size, width)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.proj(patches(images, self.patch_size))  # [B, N, C]


class DropPath(nn.Layer):
    """Stochastic depth (arXiv 1603.09382): drops the whole branch of an image with probability `p`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = Dropout(p)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.drop.p == 0.0 or not self.training:
            return x
        # One draw an image, by a dropout of ones: `F.dropout(x, axis=0)` draws a uniform of a computed shape, which
        # the auto-parallel passes of Paddle 3.3.1 refuse. The ones are those of the whole batch on every rank, which
        # takes its part of the result: so each image's draw is the same on any mesh.
        return x * self.drop(paddle.ones([x.shape[0], 1, 1], dtype=x.dtype))


class LayerScale(nn.Layer):
    """A learned factor a channel on a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = self.create_parameter([width], default_initializer=Constant(init))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * self.gamma


def linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    weight_init: Any = None,
    bias_init: float | Normal = 0.0,
) -> nn.Linear:
    """A linear layer, its weight Xavier-uniform unless `weight_init` says otherwise."""
    return nn.Linear(
        in_features,
        out_features,
        weight_attr=paddle.ParamAttr(initializer=weight_init or XavierUniform()),
        bias_attr=paddle.ParamAttr(initializer=Constant(bias_init) if isinstance(bias_init, float) else bias_init)
        if bias
        else False,
    )


class Attention(nn.Layer):
    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qkv_bias: bool,
        dropout: float,
        attention_dropout: float,
        attention: AttentionFunction,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_drop = Dropout(attention_dropout)
        self.attention = attention
        # The seed draws q, k and v as one matrix of `width` rows and 3 * `width` columns: the same limits here.
        fused = XavierUniform(fan_in=width, fan_out=3 * width)
        self.q = linear(width, width, bias=qkv_bias, weight_init=fused)
        self.k = linear(width, width, bias=qkv_bias, weight_init=fused)
        self.v = linear(width, width, bias=qkv_bias, weight_init=fused)
        self.proj = linear(width, width)
        self.proj_drop = Dropout(dropout)

    def split_heads(self, x: paddle.Tensor) -> paddle.Tensor:
        return x.reshape([0, 0, self.num_heads, x.shape[-1] // self.num_heads])  # [B, N, H, d]

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        query, key, value = self.split_heads(self.q(x)), self.split_heads(self.k(x)), self.split_heads(self.v(x))
        x = self.attention(query, key, value, self.attention_drop)  # [B, N, H, d]
        return self.proj_drop(self.proj(x.flatten(2)))  # [B, N, C]


class Mlp(nn.Layer):
    def __init__(self, width: int, hidden: int, dropout: float, gelu: str) -> None:
        super().__init__()
        self.approximate = gelu == "tanh"
        self.fc1 = linear(width, hidden, bias_init=Normal(0.0, 1e-6))
        self.fc2 = linear(hidden, width, bias_init=Normal(0.0, 1e-6))
        self.drop1 = Dropout(dropout)
        self.drop2 = Dropout(dropout)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(x), self.approximate))))  # [B, N, hidden], then [B, N, C]


class Block(nn.Layer):
    """A pre-norm Transformer block (eq. 2 and 3 of the paper)."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        attention: Attention,
        *,
        dropout: float,
        drop_path_rate: float,
        layer_scale_init: float | None,
        layer_norm_epsilon: float,
        gelu: str,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, layer_norm_epsilon)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, layer_norm_epsilon)
        self.mlp = Mlp(width, mlp_dim, dropout, gelu)
        self.drop_path1 = DropPath(drop_path_rate)
        self.drop_path2 = DropPath(drop_path_rate)
        self.ls1 = nn.Identity() if layer_scale_init is None else LayerScale(width, layer_scale_init)
        self.ls2 = nn.Identity() if layer_scale_init is None else LayerScale(width, layer_scale_init)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.drop_path1(self.ls1(self.attn(self.norm1(x)))) + x
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + x  # [B, N, C]


def build(config: ModelConfig, attention: AttentionFunction = flash_attention) -> VisionTransformer:
    """The config's model, freshly initialised. Raises ConfigError for what no ViT can be."""
    return VisionTransformer(
        **asdict(variant_of(config)),
        image_size=config.image_size,
        num_classes=config.num_classes,
        pool=config.pool,
        class_token=config.has_class_token,
        class_token_pos_embed=config.class_token_pos_embed,
        register_tokens=config.register_tokens,
        fc_norm=config.fc_norm,
        layer_norm_epsilon=config.layer_norm_epsilon,
        gelu=config.gelu,
        pos_embed=config.pos_embed,
        pos_embed_init=config.pos_embed_init,
        representation_size=config.representation_size,
        head_bias_init=config.head_bias_init,
        head_init_std=config.head_init_std,
        qkv_bias=config.qkv_bias,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        drop_path_rate=config.drop_path_rate,
        drop_path_schedule=config.drop_path_schedule,
        layer_scale_init=config.layer_scale_init,
        attention=attention,
    )


class VisionTransformer(nn.Layer):
    """Images [B, 3, height, width], normalised, to logits [B, num_classes].

    `pool` is what the head reads: ``cls``, the class token's last state; ``gap``, the patches' mean; ``cls_gap``, both
    side by side (DINOv2's). The last norm is of each token's state, as in the paper, or with
    `fc_norm` of what is pooled, as in MAE's finetuning. A class token that isn't read may be there, too (None:
    it is there if it is read). `register_tokens` stand between it and the patches, without a position; without
    `class_token_pos_embed` the class token has none either (DeiT III). `pos_embed` is ``learn`` or ``sincos2d``
    (fixed); a learned one begins as `pos_embed_init` says.
    `representation_size` puts a tanh layer of that width before the head (the paper's pretraining head).
    `drop_path_rate` is the last block's; the others' rise linearly from 0, or are the same (`drop_path_schedule`).
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        num_classes: int,
        pool: str = "cls",
        class_token: bool | None = None,
        class_token_pos_embed: bool = True,
        register_tokens: int = 0,
        fc_norm: bool = False,
        layer_norm_epsilon: float = 1e-6,
        gelu: str = "erf",
        pos_embed: str = "learn",
        pos_embed_init: str = "normal",
        representation_size: int | None = None,
        head_bias_init: float = 0.0,
        head_init_std: float = 0.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_schedule: str = "linear",
        layer_scale_init: float | None = None,
        attention: AttentionFunction = flash_attention,
    ) -> None:
        super().__init__()
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.pool, self.fc_norm, self.class_token_pos_embed = pool, fc_norm, class_token_pos_embed
        has_class_token = pool != "gap" if class_token is None else class_token
        self.num_prefix_tokens = has_class_token + register_tokens
        num_prefix_positions = int(has_class_token and class_token_pos_embed)
        num_positions = num_prefix_positions + self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbed(patch_size, width)
        self.cls_token, self.reg_token = None, None
        if has_class_token:
            self.cls_token = self.create_parameter([1, 1, width], default_initializer=Constant(0.0))
        if register_tokens:
            self.reg_token = self.create_parameter([1, register_tokens, width], default_initializer=Normal(0.0, 0.02))
        if pos_embed == "learn":
            begin = Normal(0.0, 0.02)
            if pos_embed_init == "sincos2d":
                begin = Assign(sincos2d_pos_embed(self.grid, width, num_prefix_positions))
            self.pos_embed = self.create_parameter([1, num_positions, width], default_initializer=begin)
        else:
            fixed = sincos2d_pos_embed(self.grid, width, num_prefix_positions)
            self.register_buffer("pos_embed", paddle.to_tensor(fixed), persistable=False)
        self.pos_drop = Dropout(dropout)

        rates = [drop_path_rate] * depth
        if drop_path_schedule == "linear":
            rates = [drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.LayerList(
            [
                Block(
                    width,
                    mlp_dim,
                    Attention(
                        width,
                        num_heads,
                        qkv_bias=qkv_bias,
                        dropout=dropout,
                        attention_dropout=attention_dropout,
                        attention=attention,
                    ),
                    dropout=dropout,
                    drop_path_rate=rates[index],
                    layer_scale_init=layer_scale_init,
                    layer_norm_epsilon=layer_norm_epsilon,
                    gelu=gelu,
                )
                for index in range(depth)
            ]
        )
        pooled_width = 2 * width if pool == "cls_gap" else width
        self.norm = nn.LayerNorm(pooled_width if fc_norm else width, layer_norm_epsilon)
        if representation_size is None:
            self.head0 = None
            weight_init = Normal(0.0, head_init_std) if head_init_std > 0.0 else Constant(0.0)
            self.head = linear(pooled_width, num_classes, weight_init=weight_init, bias_init=head_bias_init)
        else:
            self.head0 = linear(pooled_width, representation_size)
            self.head = linear(representation_size, num_classes, bias_init=head_bias_init)

    def embedded(self, images: paddle.Tensor) -> paddle.Tensor:
        """What the first block gets, [B, N, C]: registers, class token, patches."""
        x = self.patch_embed(images)  # [B, rows * columns, C]
        if self.cls_token is not None and self.class_token_pos_embed:
            x = _with_tokens(self.cls_token, x)
        x = x + self.pos_embed
        if self.cls_token is not None and not self.class_token_pos_embed:
            x = _with_tokens(self.cls_token, x)
        if self.reg_token is not None:
            x = _with_tokens(self.reg_token, x)
        return self.pos_drop(x)

    def features(self, images: paddle.Tensor) -> paddle.Tensor:
        """The pooled state after the last norm, [B, C] ([B, 2 C] of cls_gap)."""
        x = self.embedded(images)
        for block in self.blocks:
            x = block(x)  # [B, N, C]
        return self.norm(self.pooled(x)) if self.fc_norm else self.pooled(self.norm(x))

    def pooled(self, x: paddle.Tensor) -> paddle.Tensor:
        """What the head reads of the tokens, [B, N, C]."""
        states = [x[:, self.num_prefix_tokens - 1]] if self.pool != "gap" else []
        if self.pool != "cls":
            states.append((x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x).mean(axis=1))
        # Not `concat`, whose gradient Paddle 3.3.1 gets wrong where the head is split over ranks, without an error.
        return states[0] if len(states) == 1 else paddle.stack(states, axis=1).flatten(1)

    def logits(self, features: paddle.Tensor) -> paddle.Tensor:
        """What `features` gives to logits [B, num_classes]."""
        if self.head0 is not None:
            features = F.tanh(self.head0(features))
        return self.head(features)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.logits(self.features(images))


def _with_tokens(tokens: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """Learned tokens [1, T, C] before those of each image [B, N, C].

    A broadcast sum, not `expand`: under data parallelism Paddle 3.3.1 leaves the gradient of an expanded token
    unreduced, without an error.
    """
    return paddle.concat([paddle.zeros_like(x[:, :1]) + tokens, x], axis=1)
