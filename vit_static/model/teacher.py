"""A teacher for distillation: a frozen model that reads the images of another model, its student."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import nn

from vit_static.model.pos_embed import resampling_matrix
from vit_static.model.vit import VisionTransformer

# The layer that maps the student's features to the teacher's width. It is trained and in checkpoints, and no part of
# the model: neither merged weights nor exports have it.
PROJECTOR = "distill_projector"
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, by which greyscale images are made of colour ones


class Normalization:
    """Means and standard deviations by which pixels (0 to 1) were normalized, one per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (np.asarray(values, np.float64).reshape(1, -1, 1, 1) for values in (mean, std))


class Teacher(nn.Layer):
    """Images as the student gets them to the teacher's logits [B, num_classes], or to its features [B, C].

    The images are converted as part of the program: normalized by the teacher's mean and deviation, in its number of
    channels, and resampled to its size as Pillow's bicubic filter does. Nothing here is trained.
    """

    def __init__(
        self,
        network: VisionTransformer,
        normalization: Normalization,
        student: Normalization,
        *,
        returns_features: bool,
    ) -> None:
        super().__init__()
        self.network, self.returns_features = network, returns_features
        self._normalization, self._student = normalization, student
        for parameter in network.parameters():
            parameter.stop_gradient = True
        network.eval()

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        with paddle.amp.auto_cast(enable=False):
            images = self.convert(images)
        features = self.network.features(images)
        return features if self.returns_features else self.network.logits(features)

    def convert(self, images: paddle.Tensor) -> paddle.Tensor:
        """Convert the student's images [B, channels, height, width] (float32) to the teacher's."""
        network, theirs, ours = self.network.config, self._normalization, self._student
        if images.shape[1] == 3 and network.num_channels == 1:
            grey = np.reshape(_LUMA, (1, 3, 1, 1))
            images = (images * _constant(ours.std * grey)).sum(axis=1, keepdim=True)
            summand = (ours.mean * grey).sum() - theirs.mean
            images = images * _constant(1.0 / theirs.std) + _constant(summand / theirs.std)
        elif images.shape[1] != network.num_channels or not _are_equal(theirs, ours):
            # A greyscale image has the same value in all channels of a colour one.
            images = images * _constant(ours.std / theirs.std) + _constant((ours.mean - theirs.mean) / theirs.std)
        for axis, size in ((3, network.image_size[1]), (2, network.image_size[0])):
            if images.shape[axis] != size:
                images = _resample(images, axis, size)
        return images


def _are_equal(one: Normalization, other: Normalization) -> bool:
    return np.array_equal(one.mean, other.mean) and np.array_equal(one.std, other.std)


def _constant(values: np.ndarray) -> paddle.Tensor:
    return paddle.assign(values.astype(np.float32))


def _resample(images: paddle.Tensor, axis: int, size: int) -> paddle.Tensor:
    """Resample one of the last two axes of images [B, channels, height, width], as one product with a matrix."""
    weights = resampling_matrix(images.shape[axis], size, "antialias")  # [size, old]
    if axis == 3:
        return paddle.matmul(images, _constant(weights.T))
    return paddle.matmul(images.transpose([0, 1, 3, 2]), _constant(weights.T)).transpose([0, 1, 3, 2])
