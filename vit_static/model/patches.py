"""Images to patches, and patches to tokens."""

from __future__ import annotations

import math

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Normal


def split_into_patches(images: paddle.Tensor, patch_size: int) -> paddle.Tensor:
    """Cut images [B, channels, height, width] into patches [B, rows * columns, channels * patch**2], row by row."""
    channels, height, width = images.shape[1:]
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape([0, channels, rows, patch_size, columns, patch_size])
    x = x.transpose([0, 2, 4, 1, 3, 5])  # [B, rows, columns, channels, patch, patch]
    return x.reshape([0, rows * columns, channels * patch_size**2])


class PatchProjection(nn.Layer):
    """Patch embedding with a convolution's weight layout, computed as one matrix product.

    Stride and kernel size are equal, so both compute the same sums. The matrix product is faster and can be sharded.
    """

    def __init__(self, patch_size: int, width: int, num_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        fan_in = num_channels * patch_size**2
        self.weight = self.create_parameter(
            [width, num_channels, patch_size, patch_size], default_initializer=Normal(0.0, math.sqrt(2.0 / fan_in))
        )
        self.bias = self.create_parameter([width], is_bias=True) if bias else None

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        kernel = self.weight.reshape([self.weight.shape[0], -1])  # [C, channels * patch**2]
        x = paddle.matmul(x, kernel, transpose_y=True)  # [B, N, C]
        return x if self.bias is None else x + self.bias


class PatchEmbed(nn.Layer):
    """Images [B, channels, height, width] to tokens [B, N, C], of all patches or of those that are given."""

    def __init__(self, patch_size: int, width: int, num_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(patch_size, width, num_channels, bias=bias)

    def forward(self, images: paddle.Tensor, kept: paddle.Tensor | None = None) -> paddle.Tensor:
        """`kept` [B, N] has the numbers of the patches to embed, of each image."""
        patches = split_into_patches(images, self.patch_size)
        if kept is not None:
            # A product with ones and zeros: Paddle 3.3.1 gathers the images of all ranks for `take_along_axis`. Before
            # the projection, so that fewer patches are projected, and so that there is no gradient to compute.
            patches = paddle.matmul(F.one_hot(kept, patches.shape[1]), patches)
        return self.proj(patches)  # [B, N, C]
