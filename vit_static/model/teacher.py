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
        image_sizes: Sequence[tuple[int, int]],
        *,
        returns_features: bool,
    ) -> None:
        """`student` and `image_sizes` are those of the student's images; there may be one of several sizes."""
        super().__init__()
        self.network, self.returns_features = network, returns_features
        for parameter in network.parameters():
            parameter.stop_gradient = True
        network.eval()
        self._register_normalization(normalization, student)
        for axis, name in ((0, "rows"), (1, "columns")):
            size = network.config.image_size[axis]
            for old in {image_size[axis] for image_size in image_sizes} - {size}:
                self._register(f"{name}_{old}", resampling_matrix(old, size, "antialias").T)  # [old, size]

    def _register_normalization(self, theirs: Normalization, ours: Normalization) -> None:
        """Register the factors and summands per channel that convert the student's values to the teacher's."""
        self._makes_grey = ours.mean.size == 3 and self.network.config.num_channels == 1
        self._is_same = np.array_equal(theirs.mean, ours.mean) and np.array_equal(theirs.std, ours.std)
        if self._is_same:
            return
        mean: np.ndarray = ours.mean
        std: np.ndarray = ours.std
        if self._makes_grey:
            luma = np.reshape(_LUMA, (1, 3, 1, 1))
            self._register("grey", std * luma)
            mean, std = np.asarray((mean * luma).sum()), np.ones(1)
        self._register("factor", std / theirs.std)
        self._register("summand", (mean - theirs.mean) / theirs.std)

    def _register(self, name: str, values: np.ndarray) -> None:
        """Register a constant. As a buffer it isn't copied to the device in each step."""
        self.register_buffer(name, paddle.to_tensor(values.astype(np.float32)), persistable=False)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        with paddle.amp.auto_cast(enable=False):
            images = self.convert(images)
        features = self.network.features(images)
        return features if self.returns_features else self.network.logits(features)

    def convert(self, images: paddle.Tensor) -> paddle.Tensor:
        """Convert the student's images [B, channels, height, width] (float32) to the teacher's."""
        if self._makes_grey:
            images = (images * self.grey).sum(axis=1, keepdim=True)
        if not self._is_same:  # a greyscale image becomes three equal channels
            images = images * self.factor + self.summand
        height, width = self.network.config.image_size
        if images.shape[3] != width:
            images = paddle.matmul(images, getattr(self, f"columns_{images.shape[3]}"))
        if images.shape[2] != height:
            rows = getattr(self, f"rows_{images.shape[2]}")
            images = paddle.matmul(images.transpose([0, 1, 3, 2]), rows).transpose([0, 1, 3, 2])
        return images
