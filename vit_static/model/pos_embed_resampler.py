"""Resampling of a learned position embedding within the model, so that it is trained on images of several sizes."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn

from vit_static.config.schema import PosEmbedResampling
from vit_static.model.layers import to_dtype
from vit_static.model.pos_embed import resampling_matrix


class PosEmbedResampler(nn.Layer):
    """Resample a position embedding [1, prefix + rows * columns, C] to another grid, differentiably.

    Returns the prefix [1, prefix, C] and the patches' positions [1, new rows * columns, C]. The same linear map as
    `resample_pos_embed`, by two matrix products, so its gradient is the transposed map. As in FlexiViT (arXiv
    2212.08013) the parameter keeps one grid, and is resampled in each step.

    Computed in float32. program/autocast.py keeps mixed precision from these products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode: PosEmbedResampling = "bicubic"

    def forward(
        self, pos_embed: paddle.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        rows, columns = (
            paddle.to_tensor(resampling_matrix(old, new, self.mode).astype(np.float32))
            for old, new in zip(old_grid, new_grid, strict=True)
        )
        width, num_prefix = pos_embed.shape[-1], pos_embed.shape[1] - old_grid[0] * old_grid[1]
        x = to_dtype(pos_embed[:, num_prefix:], paddle.float32).reshape([old_grid[0], old_grid[1] * width])
        x = paddle.matmul(rows, x)  # [new rows, columns * C]
        x = x.reshape([new_grid[0], old_grid[1], width]).transpose([1, 0, 2])
        x = paddle.matmul(columns, x.reshape([old_grid[1], new_grid[0] * width]))  # [new columns, new rows * C]
        x = x.reshape([new_grid[1], new_grid[0], width]).transpose([1, 0, 2])
        resampled = to_dtype(x.reshape([1, new_grid[0] * new_grid[1], width]), pos_embed.dtype)
        return pos_embed[:, :num_prefix], resampled
