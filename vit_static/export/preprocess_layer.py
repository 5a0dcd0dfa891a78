"""The preprocessing of the evaluation as a part of the exported program: pixels in, probabilities out."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.data.dali_pipeline import MAX_RESIZE_TO_CROP_RATIO, size_before_crop
from vit_static.inference.artifact import Preprocessing

_RADIUS = {"bilinear": 1, "bicubic": 2}  # of the kernel, in pixels


class FromPixels(nn.Layer):
    """Pixels [B, height, width, 3] uint8, RGB, of any height and width, to probabilities [B, num_classes] and features
    [B, C], both float32.

    `model`: images [B, 3, h, w] float32 to logits and features. What `data.pipeline.preprocessed` does, to a grey
    level.
    A resampling is separable, a product with a matrix for each axis, which is computed here for the sides that come; of
    rows and columns that are cut off afterwards none is.
    """

    def __init__(self, model: nn.Layer, preprocessing: Preprocessing, activation: str) -> None:
        super().__init__()
        self.model, self.preprocessing, self.activation = model, preprocessing, activation

    def forward(self, pixels: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        logits, features = self.model(self.preprocessed(pixels))
        is_softmax = self.activation == "softmax"
        return F.softmax(logits, axis=-1) if is_softmax else F.sigmoid(logits), features

    def preprocessed(self, pixels: paddle.Tensor) -> paddle.Tensor:
        """Images [B, 3, h, w] float32, as the model takes them."""
        asked = self.preprocessing
        shape = paddle.shape(pixels).astype("float32")
        height, width = shape[1], shape[2]
        scale = None
        least = size_before_crop(asked.image_size, asked.as_evaluation())
        if asked.resize == "short":
            scale = paddle.maximum(least[0] / height, least[1] / width)
        rows = self._weights(height, asked.image_size[0], scale, least[0])  # [h, height]
        columns = self._weights(width, asked.image_size[1], scale, least[1])  # [w, width]
        x = pixels.transpose([0, 3, 1, 2]).astype("float32")
        x = paddle.matmul(paddle.matmul(rows, x), columns, transpose_y=True)  # [B, 3, h, w]
        x = paddle.clip(paddle.floor(x + 0.5), 0.0, 255.0)  # whole levels, as DALI leaves them
        mean = paddle.to_tensor([255.0 * value for value in asked.mean]).reshape([1, 3, 1, 1])
        std = paddle.to_tensor([255.0 * value for value in asked.std]).reshape([1, 3, 1, 1])
        return (x - mean) / std

    def _weights(self, side: paddle.Tensor, kept: int, scale: paddle.Tensor | None, least: int) -> paddle.Tensor:
        """Of a side's pixels in each of the middle `kept` of those that it is resized to: [kept, side].

        `scale` None: it is resized to `kept`; else to so many times its pixels, of a long side (data/pipeline.py) its
        middle alone. What the kernel would take from beyond the image is the image's outermost pixel.
        """
        asked = self.preprocessing
        start, taken, wanted = 0.0, side, kept
        if scale is not None:
            taken = paddle.minimum(side, paddle.ceil(MAX_RESIZE_TO_CROP_RATIO * float(least) / scale))
            start, wanted = paddle.floor((side - taken) / 2.0), paddle.floor(taken * scale + 0.5)
        factor = taken / wanted
        width = paddle.maximum(factor, paddle.ones([])) if asked.antialias else paddle.ones([])
        corner = 0.0 if scale is None else paddle.floor((wanted - kept) / 2.0)
        places = start + (paddle.arange(kept, dtype="float32") + corner + 0.5) * factor - 0.5
        places = places.unsqueeze(1)  # [kept, 1]
        beyond = paddle.ceil(_RADIUS[asked.interpolation] * width) + 1.0

        def weights(first: Any, end: Any) -> paddle.Tensor:
            pixels = paddle.arange(first, end, dtype="float32")
            return _kernel((pixels.unsqueeze(0) - places) / width, asked.interpolation)

        inside = weights(paddle.zeros([]), side)
        before, after = weights(-beyond, paddle.zeros([])), weights(side, side + beyond)
        pixels = paddle.arange(paddle.zeros([]), side, dtype="float32").unsqueeze(0)
        inside = inside + before.sum(axis=1, keepdim=True) * (pixels < 0.5).astype("float32")
        inside = inside + after.sum(axis=1, keepdim=True) * (pixels > side - 1.5).astype("float32")
        return inside / inside.sum(axis=1, keepdim=True)


def _kernel(x: paddle.Tensor, interpolation: str) -> paddle.Tensor:
    """The triangle, or Keys's cubic with a = -1/2 (IEEE Trans. ASSP 29, 1981), as Pillow and DALI have it."""
    x = paddle.abs(x)
    if interpolation == "bilinear":
        return F.relu(1.0 - x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return paddle.where(x < 1.0, near, paddle.where(x < 2.0, far, paddle.zeros_like(x)))
