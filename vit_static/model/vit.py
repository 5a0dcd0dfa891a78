"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929).

The layers know nothing of precision, meshes, checkpoints or files. Shapes in the trailing comments: B images, N tokens
(registers, class token, patches), C the width, H heads with d = C / H channels each.

In memory the query, key and value projections are three layers, so that tensor parallelism can split each of them by
heads without moving data. In files they are one matrix, ``attn.qkv``, as in PLSC and timm; `weights.formats.fuse_qkv`
and `split_qkv` convert between the two.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Assign, Constant, Normal

from vit_static.config.schema import ModelConfig
from vit_static.model.attention import Attention, AttentionFunction, attention_by_matmul
from vit_static.model.layers import Dropout, DropPath, LayerScale, linear
from vit_static.model.mlp import Mlp
from vit_static.model.patches import PatchEmbed
from vit_static.model.pos_embed import sincos2d_pos_embed
from vit_static.model.variants import Variant, grid_of, variant_of


class Block(nn.Layer):
    """Pre-norm Transformer block, [B, N, C] in and out (eq. 2 and 3 of the paper)."""

    def __init__(
        self, config: ModelConfig, variant: Variant, drop_path_rate: float, attention: AttentionFunction
    ) -> None:
        super().__init__()
        width = variant.width
        self.norm1 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.attn = Attention(config, variant, attention)
        self.norm2 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.mlp = Mlp(config, variant)
        self.drop_path1 = DropPath(drop_path_rate)
        self.drop_path2 = DropPath(drop_path_rate)
        self.ls1 = _layer_scale(config, width)
        self.ls2 = _layer_scale(config, width)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.drop_path1(self.ls1(self.attn(self.norm1(x)))) + x
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + x  # [B, N, C]


def _layer_scale(config: ModelConfig, width: int) -> nn.Layer:
    return nn.Identity() if config.layer_scale_init is None else LayerScale(width, config.layer_scale_init)


class VisionTransformer(nn.Layer):
    """Vision Transformer: normalized images [B, num_channels, height, width] to logits [B, num_classes], or to its
    features if it has no classes.

    The fields of `ModelConfig` describe the options. With `fc_norm` the last LayerNorm is applied to the pooled state
    instead of to each token, as in MAE's finetuning. Register tokens come before the class token and have no position
    embedding; without `class_token_pos_embed` the class token has none either (DeiT III).

    `attention` computes the attention of every block. Raises ConfigError if the config describes no valid ViT.
    """

    def __init__(self, config: ModelConfig, attention: AttentionFunction = attention_by_matmul) -> None:
        super().__init__()
        variant = variant_of(config)
        width = variant.width
        self.grid = grid_of(config)
        self.pool, self.fc_norm = config.pool, config.fc_norm
        self.class_token_pos_embed = config.class_token_pos_embed
        self.num_prefix_tokens = config.num_prefix_tokens

        # Layers draw their weights from one random generator: keep the order of creation.
        self.patch_embed = PatchEmbed(variant.patch_size, width, config.num_channels)
        self.cls_token, self.reg_token = None, None
        if config.has_class_token:
            self.cls_token = self.create_parameter([1, 1, width], default_initializer=Constant(0.0))
        if config.register_tokens:
            self.reg_token = self.create_parameter(
                [1, config.register_tokens, width], default_initializer=Normal(0.0, 0.02)
            )
        self._create_pos_embed(config, width)
        self.pos_drop = Dropout(config.dropout)
        rates = _drop_path_rates(config, variant.depth)
        self.blocks = nn.LayerList([Block(config, variant, rate, attention) for rate in rates])

        pooled_width = 2 * width if config.pool == "cls_gap" else width
        self.norm = nn.LayerNorm(pooled_width if config.fc_norm else width, config.layer_norm_epsilon)
        self.head0, self.head = None, None
        if config.num_classes == 0:
            return
        if config.representation_size is None:
            std = config.head_init_std
            weight_init = Normal(0.0, std) if std > 0.0 else Constant(0.0)
            self.head = linear(
                pooled_width, config.num_classes, weight_init=weight_init, bias_init=config.head_bias_init
            )
        else:
            self.head0 = linear(pooled_width, config.representation_size)
            self.head = linear(config.representation_size, config.num_classes, bias_init=config.head_bias_init)

    def _create_pos_embed(self, config: ModelConfig, width: int) -> None:
        """Create the position embedding [1, positions, C]: a parameter, or a buffer if it is fixed."""
        num_positions = config.num_prefix_positions + self.grid[0] * self.grid[1]
        if config.pos_embed == "learn":
            initializer = Normal(0.0, 0.02)
            if config.pos_embed_init == "sincos2d":
                initializer = Assign(sincos2d_pos_embed(self.grid, width, config.num_prefix_positions))
            self.pos_embed = self.create_parameter([1, num_positions, width], default_initializer=initializer)
        else:
            fixed = sincos2d_pos_embed(self.grid, width, config.num_prefix_positions)
            self.register_buffer("pos_embed", paddle.to_tensor(fixed), persistable=False)

    def embed(self, images: paddle.Tensor) -> paddle.Tensor:
        """Compute the first block's input [B, N, C]: registers, class token, patches."""
        x = self.patch_embed(images)  # [B, rows * columns, C]
        if self.cls_token is not None and self.class_token_pos_embed:
            x = _prepend_tokens(self.cls_token, x)
        x = x + self.pos_embed
        if self.cls_token is not None and not self.class_token_pos_embed:
            x = _prepend_tokens(self.cls_token, x)
        if self.reg_token is not None:
            x = _prepend_tokens(self.reg_token, x)
        return self.pos_drop(x)

    def features(self, images: paddle.Tensor) -> paddle.Tensor:
        """Compute the pooled, normalized state that the head reads: [B, C], or [B, 2 C] with cls_gap."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)  # [B, N, C]
        return self.norm(self.pool_tokens(x)) if self.fc_norm else self.pool_tokens(self.norm(x))

    def pool_tokens(self, x: paddle.Tensor) -> paddle.Tensor:
        """Pool tokens [B, N, C] to [B, C], or to [B, 2 C] with cls_gap."""
        states = [x[:, self.num_prefix_tokens - 1]] if self.pool != "gap" else []
        if self.pool != "cls":
            states.append((x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x).mean(axis=1))
        # Not `concat`: with a head split over ranks, Paddle 3.3.1 computes a wrong gradient for it without an error.
        return states[0] if len(states) == 1 else paddle.stack(states, axis=1).flatten(1)

    def logits(self, features: paddle.Tensor) -> paddle.Tensor:
        """Apply the head to the result of `features`; return logits [B, num_classes]. Without a head: the features."""
        if self.head is None:
            return features
        if self.head0 is not None:
            features = F.tanh(self.head0(features))
        return self.head(features)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.logits(self.features(images))


def _drop_path_rates(config: ModelConfig, depth: int) -> list[float]:
    """Return the drop-path rate of each block."""
    if config.drop_path_schedule == "linear":
        return [config.drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
    return [config.drop_path_rate] * depth


def _prepend_tokens(tokens: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """Prepend learned tokens [1, T, C] to the tokens of each image [B, N, C].

    This is a broadcast sum and not `expand`: under data parallelism Paddle 3.3.1 doesn't reduce the gradient of an
    expanded token over the ranks, and raises no error.
    """
    return paddle.concat([paddle.zeros_like(x[:, :1]) + tokens, x], axis=1)
