"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929).

The layers know nothing of precision, meshes, checkpoints or files. Shapes in the trailing comments: B images, N tokens
(registers, class token, patches), C the width, H heads with d = C / H channels each.

In memory the query, key and value projections are three layers, so that tensor parallelism can split each of them by
heads without moving data. In files they are one matrix, ``attn.qkv``, as in PLSC and timm; `weights.state.fuse_qkv`
and `split_qkv` convert between the two.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Assign, Constant, Normal

from vit_static.config.model_schema import ModelConfig
from vit_static.model.attention import Attention, AttentionFunction, attention_by_matmul
from vit_static.model.draws import Draw, DrawFunction, ImageSize, at_size, draw_here, uses_box, uses_patch_dropout
from vit_static.model.layers import Dropout, DropPath, LayerScale, linear, make_norm
from vit_static.model.mlp import Mlp
from vit_static.model.patches import PatchEmbed
from vit_static.model.pooling import AttentionPool
from vit_static.model.pos_embed import sincos2d_pos_embed
from vit_static.model.pos_embed_resampler import PosEmbedResampler
from vit_static.model.variants import Variant, grid_of, variant_of


class Block(nn.Layer):
    """Pre-norm Transformer block, [B, N, C] in and out (eq. 2 and 3 of the paper).

    With `tokens` it computes only these, [B, M, C]: keys and values of all tokens, and all else of the M.
    """

    def __init__(
        self, config: ModelConfig, variant: Variant, drop_path_rate: float, attention: AttentionFunction
    ) -> None:
        super().__init__()
        width = variant.width
        self.norm1 = make_norm(config, width)
        self.attn = Attention(config, variant, attention)
        self.norm2 = make_norm(config, width)
        self.mlp = Mlp(config, variant)
        self.drop_path1 = DropPath(drop_path_rate)
        self.drop_path2 = DropPath(drop_path_rate)
        self.ls1 = _layer_scale(config, width)
        self.ls2 = _layer_scale(config, width)

    def forward(self, x: paddle.Tensor, draw: Draw | None = None, tokens: slice | None = None) -> paddle.Tensor:
        states, queries = self.norm1(x), None
        if tokens is not None:
            # Normalized again, not a slice of `states`: so the gradient of `states` is the sum of those by keys and
            # values alone, which tensor parallelism then reduces together.
            x = x[:, tokens]
            queries = self.norm1(x)
        x = self.drop_path1(self.ls1(self.attn(states, draw, queries, tokens))) + x
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + x  # [B, N, C]


def _layer_scale(config: ModelConfig, width: int) -> nn.Layer:
    return nn.Identity() if config.layer_scale_init is None else LayerScale(width, config.layer_scale_init)


class VisionTransformer(nn.Layer):
    """Vision Transformer: normalized images [B, num_channels, height, width] to logits [B, num_classes], or to its
    features if it has no classes.

    Images may have another size than the config's: a learned position embedding, which has the grid of the config's
    size, is then resampled to their grid by `pos_embed_resampler`; other positions are those of a model of their size.

    The fields of `ModelConfig` describe the options. With `fc_norm` the last norm is applied to the pooled state
    instead of to each token, as in MAE's finetuning. Register tokens come before the class token and have no position
    embedding; without `class_token_pos_embed` the class token has none either (DeiT III). A distillation token follows
    the class token and has a head of its own; the logits are the mean of both heads' (DeiT, arXiv 2012.12877).

    If the heads read only these two, the last block computes no other token, unless `compute_unread_tokens` is set.

    `attention` computes the attention of every block. In training, `draws` makes the random choices that all blocks
    share (draws.py). Raises ConfigError if the config describes no valid ViT.
    """

    def __init__(self, config: ModelConfig, attention: AttentionFunction = attention_by_matmul) -> None:
        super().__init__()
        self.config = config
        variant = variant_of(config)
        width = variant.width
        self.grid = grid_of(config)
        self.pool, self.fc_norm = config.pool, config.fc_norm
        self.class_token_pos_embed = config.class_token_pos_embed
        self.class_token_index = config.register_tokens  # if there is one
        self.num_prefix_tokens, self.num_prefix_positions = config.num_prefix_tokens, config.num_prefix_positions
        # The tokens that the last block computes; None: all.
        self.read_tokens: slice | None = None
        if config.num_read_tokens is not None:
            self.read_tokens = slice(config.register_tokens, config.register_tokens + config.num_read_tokens)
        self.has_draws = uses_patch_dropout(config) or uses_box(config)
        self.draws: DrawFunction = partial(draw_here, config, variant.depth)

        # Layers draw their weights from one random generator: keep the order of creation.
        has_patch_bias = not config.pre_norm
        self.patch_embed = PatchEmbed(variant.patch_size, width, config.num_channels, bias=has_patch_bias)
        self.cls_token, self.dist_token, self.reg_token = None, None, None
        if config.has_class_token:
            self.cls_token = self.create_parameter([1, 1, width], default_initializer=Constant(0.0))
        if config.distillation_token:
            self.dist_token = self.create_parameter([1, 1, width], default_initializer=Normal(0.0, 0.02))
        if config.register_tokens:
            self.reg_token = self.create_parameter(
                [1, config.register_tokens, width], default_initializer=Normal(0.0, 0.02)
            )
        self._create_pos_embed(config, width)
        self.pos_embed_resampler = PosEmbedResampler()
        self.pos_drop = Dropout(config.dropout)
        self.norm_pre = make_norm(config, width) if config.pre_norm else None
        rates = _drop_path_rates(config, variant.depth)
        self.blocks = nn.LayerList([Block(config, variant, rate, attention) for rate in rates])

        pooled_width = 2 * width if config.pool == "cls_gap" else width
        self.norm = make_norm(config, pooled_width if config.fc_norm else width)
        self.attn_pool = AttentionPool(config, variant, attention) if config.pool == "map" else None
        self.head0, self.head, self.head_dist = None, None, None
        if config.num_classes == 0:
            return
        if config.representation_size is None:
            std = config.head_init_std
            weight_init = Normal(0.0, std) if std > 0.0 else Constant(0.0)
            self.head = linear(
                pooled_width, config.num_classes, weight_init=weight_init, bias_init=config.head_bias_init
            )
            if config.distillation_token:
                self.head_dist = linear(
                    width, config.num_classes, weight_init=weight_init, bias_init=config.head_bias_init
                )
        else:
            self.head0 = linear(pooled_width, config.representation_size)
            self.head = linear(config.representation_size, config.num_classes, bias_init=config.head_bias_init)

    @property
    def class_tokens(self) -> slice:
        """The tokens that the heads read with pool cls."""
        return slice(self.class_token_index, self.class_token_index + (1 if self.dist_token is None else 2))

    def _create_pos_embed(self, config: ModelConfig, width: int) -> None:
        """Create the position embedding [1, positions, C]: a parameter, or a buffer if it is fixed, or none."""
        if config.pos_embed == "none":
            self.pos_embed = None
            return
        num_positions = config.num_prefix_positions + self.grid[0] * self.grid[1]
        if config.pos_embed == "learn":
            initializer = Normal(0.0, 0.02)
            if config.pos_embed_init == "sincos2d":
                initializer = Assign(sincos2d_pos_embed(self.grid, width, config.num_prefix_positions))
            self.pos_embed = self.create_parameter([1, num_positions, width], default_initializer=initializer)
        else:
            fixed = sincos2d_pos_embed(self.grid, width, config.num_prefix_positions)
            self.register_buffer("pos_embed", paddle.to_tensor(fixed), persistable=False)

    def embed(self, images: paddle.Tensor, draw: Draw | None = None) -> paddle.Tensor:
        """Compute the first block's input [B, N, C]: registers, class token, patches."""
        kept = None if draw is None else draw.tokens
        kept_patches = None if kept is None else kept[:, self.num_prefix_tokens :] - self.num_prefix_tokens
        x = self.patch_embed(images, kept_patches)
        image_size = self._other_size(images)
        if self.pos_embed is not None and image_size is not None:
            x = self._add_positions_at(image_size, x, self.pos_embed, kept_patches)
        elif self.class_token_pos_embed:
            x = self._prepend_class_tokens(x)
        if self.pos_embed is not None and image_size is None:
            x = x + (self.pos_embed if kept is None else self._positions_of(kept, self.pos_embed))
        if not self.class_token_pos_embed:
            x = self._prepend_class_tokens(x)
        if self.reg_token is not None:
            x = _prepend_tokens(self.reg_token, x)
        x = self.pos_drop(x)
        return x if self.norm_pre is None else self.norm_pre(x)

    def _prepend_class_tokens(self, x: paddle.Tensor, positions: paddle.Tensor | None = None) -> paddle.Tensor:
        """Prepend the class token and the distillation token, as far as the model has them, with their `positions`."""
        tokens = [token for token in (self.cls_token, self.dist_token) if token is not None]
        for index, token in reversed([*enumerate(tokens)]):
            x = _prepend_tokens(token, x, None if positions is None else positions[:, index : index + 1])
        return x

    def _positions_of(self, tokens: paddle.Tensor, pos_embed: paddle.Tensor) -> paddle.Tensor:
        """Return the position embedding of the tokens that have one, [B, positions, C], among `tokens` [B, N]."""
        first = self.num_prefix_tokens - self.num_prefix_positions
        return _rows_of(pos_embed.flatten(0, 1), tokens[:, first:] - first)

    def _other_size(self, images: paddle.Tensor) -> ImageSize | None:
        """Return the size of the images if it isn't the model's own."""
        height, width = images.shape[2:]
        return None if (height, width) == self.config.image_size else (height, width)

    def _add_positions_at(
        self,
        image_size: ImageSize,
        x: paddle.Tensor,
        pos_embed: paddle.Tensor,
        kept_patches: paddle.Tensor | None,
    ) -> paddle.Tensor:
        """Add the positions of images of another size to their patches x, and prepend the class token with its own."""
        grid = grid_of(at_size(self.config, image_size))
        if self.config.pos_embed == "learn":
            prefix, table = self.pos_embed_resampler(pos_embed, self.grid, grid)  # [1, prefix, C], [1, patches, C]
        else:
            prefix = pos_embed[:, : self.num_prefix_positions]
            table = paddle.to_tensor(sincos2d_pos_embed(grid, x.shape[-1]))
        x = x + (table if kept_patches is None else _rows_of(table.flatten(0, 1), kept_patches))
        # Not one table for all tokens: Paddle 3.3.1 computes wrong gradients for a `concat` whose gradient comes as
        # partial sums over the ranks.
        return self._prepend_class_tokens(x, prefix) if self.class_token_pos_embed else x

    def encode(self, images: paddle.Tensor) -> paddle.Tensor:
        """Compute the last block's output: all tokens [B, N, C], or only `read_tokens` [B, M, C]."""
        height, width = images.shape[2:]
        draws: list[Draw | None] = [None] * len(self.blocks)
        if self.has_draws and self.training:
            draws = [*self.draws(images.shape[0], (height, width))]
        image_size = self._other_size(images)
        if image_size is not None:
            draws = [replace(draw or Draw(), image_size=image_size) for draw in draws]
        x = self.embed(images, draws[0])
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = block(x, draws[index], self.read_tokens if index == last else None)
        return x

    def features(self, images: paddle.Tensor) -> paddle.Tensor:
        """Compute the pooled, normalized state that the head reads: [B, C], or [B, 2 C] with cls_gap or two heads."""
        x = self.encode(images)
        return self.norm(self.pool_tokens(x)) if self.fc_norm else self.pool_tokens(self.norm(x))

    def pool_tokens(self, x: paddle.Tensor) -> paddle.Tensor:
        """Pool tokens, as `encode` returns them, to [B, C], or to [B, 2 C] with cls_gap or a distillation token."""
        if self.read_tokens is not None:
            return x.flatten(1)
        if self.attn_pool is not None:
            return self.attn_pool(x)
        states = [x[:, self.class_token_index]] if self.pool != "gap" else []
        if self.dist_token is not None:
            states.append(x[:, self.class_token_index + 1])
        if self.pool != "cls":
            states.append((x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x).mean(axis=1))
        # Not `concat`: with a head split over ranks, Paddle 3.3.1 computes a wrong gradient for it without an error.
        return states[0] if len(states) == 1 else paddle.stack(states, axis=1).flatten(1)

    def logits(self, features: paddle.Tensor) -> paddle.Tensor:
        """Apply the head to the result of `features`; return logits [B, num_classes]. Without a head: the features."""
        if self.head is None:
            return features
        if self.head_dist is not None:
            class_logits, token_logits = self.logits_of_heads(features)
            return (class_logits + token_logits) / 2.0
        if self.head0 is not None:
            features = F.tanh(self.head0(features))
        return self.head(features)

    def logits_of_heads(self, features: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return the logits of the class token's head and of the distillation token's, [B, num_classes] each."""
        assert self.head is not None and self.head_dist is not None, "a model with two heads"
        class_token, distillation_token = self.split_features(features)
        return self.head(class_token), self.head_dist(distillation_token)

    @staticmethod
    def split_features(features: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Split features [B, 2 C] of a class token and a distillation token into [B, C] each."""
        both = features.reshape([0, 2, features.shape[-1] // 2])
        return both[:, 0], both[:, 1]

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self.logits(self.features(images))


def _drop_path_rates(config: ModelConfig, depth: int) -> list[float]:
    """Return the drop-path rate of each block."""
    if config.drop_path_schedule == "linear":
        return [config.drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
    return [config.drop_path_rate] * depth


def _rows_of(table: paddle.Tensor, numbers: paddle.Tensor) -> paddle.Tensor:
    """Return the rows of a table [positions, C] with the numbers [B, N]: [B, N, C]."""
    # Not `embedding`: Paddle 3.3.1 has no rule for its table being split over the ranks that split the images. And not
    # a product of two three-dimensional operands of which one is broadcast: its gradient isn't reduced.
    return paddle.matmul(F.one_hot(numbers, table.shape[0]), table)


def _prepend_tokens(tokens: paddle.Tensor, x: paddle.Tensor, positions: paddle.Tensor | None = None) -> paddle.Tensor:
    """Prepend learned tokens [1, T, C], with their `positions` added, to the tokens of each image [B, N, C].

    This is a broadcast sum and not `expand`: under data parallelism Paddle 3.3.1 doesn't reduce the gradient of an
    expanded token over the ranks, and raises no error.
    """
    tokens = paddle.zeros_like(x[:, :1]) + tokens
    return paddle.concat([tokens if positions is None else tokens + positions, x], axis=1)
