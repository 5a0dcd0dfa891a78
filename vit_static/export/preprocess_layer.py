"""Evaluation preprocessing as part of the exported program: from pixels to probabilities."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.data.dali_pipeline import MAX_RESIZE_TO_CROP_RATIO, size_before_crop
from vit_static.inference.artifact import Preprocessing

_LUMA = [0.299, 0.587, 0.114]  # weights of R, G and B in grey (ITU-R BT.601)
_KERNEL_RADIUS = {"bilinear": 1, "bicubic": 2}  # pixels


class FromPixels(nn.Layer):
    """Pixels [B, height, width, 3] uint8, RGB, of any size to probabilities [B, num_classes] and features [B, C].

    The outputs are float32. `model` maps images [B, 3, h, w] float32 to logits and features, or to features alone. The
    preprocessing agrees with DALI's (`dali_pipeline`) to one grey level. Resampling is separable, so it is a product
    with one matrix per axis. The matrices are computed for the size of the input, and only for those rows and columns
    that the crop keeps.
    """

    def __init__(self, model: nn.Layer, preprocessing: Preprocessing, activation: str) -> None:
        super().__init__()
        self.model, self.preprocessing, self.activation = model, preprocessing, activation

    def forward(self, pixels: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        *logits, features = self.model(self.preprocess(pixels))
        if not logits:
            return (features,)
        is_softmax = self.activation == "softmax"
        return F.softmax(logits[0], axis=-1) if is_softmax else F.sigmoid(logits[0]), features

    def preprocess(self, pixels: paddle.Tensor) -> paddle.Tensor:
        """Return the model's input [B, 3, h, w] float32, or [B, 1, h, w] if mean and std have one value."""
        preprocessing = self.preprocessing
        shape = paddle.shape(pixels).astype("float32")
        height, width = shape[1], shape[2]
        scale = None
        min_size = size_before_crop(preprocessing.image_size, preprocessing.to_eval_config())
        if preprocessing.resize == "short":
            scale = paddle.maximum(min_size[0] / height, min_size[1] / width)
        rows = self._resampling_matrix(height, preprocessing.image_size[0], scale, min_size[0])  # [h, height]
        columns = self._resampling_matrix(width, preprocessing.image_size[1], scale, min_size[1])  # [w, width]
        x = pixels.transpose([0, 3, 1, 2]).astype("float32")
        x = paddle.matmul(paddle.matmul(rows, x), columns, transpose_y=True)  # [B, 3, h, w]
        x = paddle.clip(paddle.floor(x + 0.5), 0.0, 255.0)  # DALI rounds to integers here
        if len(preprocessing.mean) == 1:
            luma = paddle.to_tensor(_LUMA).reshape([1, 3, 1, 1])
            x = paddle.floor((x * luma).sum(axis=1, keepdim=True) + 0.5)  # [B, 1, h, w]
        mean = paddle.to_tensor([255.0 * value for value in preprocessing.mean]).reshape([1, -1, 1, 1])
        std = paddle.to_tensor([255.0 * value for value in preprocessing.std]).reshape([1, -1, 1, 1])
        return (x - mean) / std

    def _resampling_matrix(
        self, side: paddle.Tensor, crop: int, scale: paddle.Tensor | None, min_side: int
    ) -> paddle.Tensor:
        """Return the weights [crop, side] of an axis's `side` pixels in its `crop` output pixels.

        Without `scale` the axis is resized to `crop` pixels. With it, the axis is resized by this factor, to at least
        `min_side` pixels, and its centre is cropped; of a very long axis only the middle is resized, as in
        `dali_pipeline`. Beyond its border an image continues with its outermost pixel.
        """
        preprocessing = self.preprocessing
        start, source_length, resized_length = 0.0, side, crop
        if scale is not None:
            source_length = paddle.minimum(side, paddle.ceil(MAX_RESIZE_TO_CROP_RATIO * float(min_side) / scale))
            start = paddle.floor((side - source_length) / 2.0)
            resized_length = paddle.floor(source_length * scale + 0.5)
        step = source_length / resized_length  # source pixels per output pixel
        kernel_scale = paddle.maximum(step, paddle.ones([])) if preprocessing.antialias else paddle.ones([])
        crop_start = 0.0 if scale is None else paddle.floor((resized_length - crop) / 2.0)
        centres = start + (paddle.arange(crop, dtype="float32") + crop_start + 0.5) * step - 0.5
        centres = centres.unsqueeze(1)  # [crop, 1]
        margin = paddle.ceil(_KERNEL_RADIUS[preprocessing.interpolation] * kernel_scale) + 1.0

        def weights(first: Any, end: Any) -> paddle.Tensor:
            positions = paddle.arange(first, end, dtype="float32")
            return _kernel((positions.unsqueeze(0) - centres) / kernel_scale, preprocessing.interpolation)

        inside = weights(paddle.zeros([]), side)
        before, after = weights(-margin, paddle.zeros([])), weights(side, side + margin)
        positions = paddle.arange(paddle.zeros([]), side, dtype="float32").unsqueeze(0)
        inside = inside + before.sum(axis=1, keepdim=True) * (positions < 0.5).astype("float32")
        inside = inside + after.sum(axis=1, keepdim=True) * (positions > side - 1.5).astype("float32")
        return inside / inside.sum(axis=1, keepdim=True)


def _kernel(x: paddle.Tensor, interpolation: str) -> paddle.Tensor:
    """Evaluate the triangle or Keys's cubic with a = -1/2 (IEEE Trans. ASSP 29, 1981), as in Pillow and DALI."""
    x = paddle.abs(x)
    if interpolation == "bilinear":
        return F.relu(1.0 - x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return paddle.where(x < 1.0, near, paddle.where(x < 2.0, far, paddle.zeros_like(x)))
