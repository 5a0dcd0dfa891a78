"""Mixup and CutMix of a training batch, on the device, reproducibly per step.

Each image is mixed with its neighbour in the batch, in pairs. The share is drawn for the whole global batch, from the
seed and the step. So an image has the same partner and the same share, however many ranks divide the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F

from vit_static.config.data_schema import AugmentConfig
from vit_static.data.sampler import mixup_generator


@dataclass(frozen=True)
class Mixup:
    """Apply mixup and CutMix to the batches of a run, as configured, or nothing."""

    augment: AugmentConfig
    num_classes: int
    seed: int

    def __call__(self, batch: tuple[paddle.Tensor, ...], step: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return the images [B, 3, height, width] and targets of the update that follows `step` completed ones.

        Labels are [B] or, with several per image, [B, num_classes] of 0 and 1. With mixup or CutMix configured, the
        targets are [B, num_classes] float32; without, images and labels are returned unchanged.
        """
        images, labels = batch
        if self.augment.mixup_alpha == 0.0 and self.augment.cutmix_alpha == 0.0:
            return images, labels
        targets = F.one_hot(labels, self.num_classes) if labels.ndim == 1 else labels.astype("float32")
        return mix(images, targets, draw_mix_params(self.augment, tuple(images.shape[2:]), self.seed, step))


@dataclass(frozen=True)
class MixParams:
    """How a batch is mixed. `share` (0-1) is the part of itself that each image keeps.

    With a `box` (top, bottom, left, right, in pixels), the box is replaced by the partner's (CutMix); without, every
    pixel is blended (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix_params(augment: AugmentConfig, image_size: tuple[int, int], seed: int, step: int) -> MixParams:
    """Draw how a step's batch is mixed; the same on every rank.

    mixup: arXiv 1710.09412. CutMix: arXiv 1905.04899; the share is what remains of the image outside the box after the
    box is clipped at the image's borders. If both are on, one of them is selected per batch. One share is drawn per
    batch, as in DeiT's recipe.
    """
    generator = mixup_generator(seed, step)
    is_mixed, is_cutmix = generator.random(2) < (augment.mix_probability, augment.mixup_switch_prob)
    if not is_mixed:
        return MixParams(1.0)
    if augment.cutmix_alpha == 0.0 or (augment.mixup_alpha > 0.0 and not is_cutmix):
        return MixParams(float(generator.beta(augment.mixup_alpha, augment.mixup_alpha)))
    height, width = image_size
    side = math.sqrt(1.0 - generator.beta(augment.cutmix_alpha, augment.cutmix_alpha))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = generator.integers(height), generator.integers(width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    box = (int(top), int(bottom), int(left), int(right))
    return MixParams(1.0 - (bottom - top) * (right - left) / (height * width), box)


def mix(images: paddle.Tensor, targets: paddle.Tensor, params: MixParams) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mix images [B, 3, height, width] and targets [B, num_classes], B even, with their partners, into new tensors."""
    if params.share == 1.0:
        return images, targets
    targets = params.share * targets + (1.0 - params.share) * _partners(targets)
    if params.box is None:
        return params.share * images + (1.0 - params.share) * _partners(images), targets
    top, bottom, left, right = params.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = _partners(images[:, :, top:bottom, left:right])
    return mixed, targets


def _partners(values: paddle.Tensor) -> paddle.Tensor:
    """Return [B, ...] in the order 1, 0, 3, 2, ..."""
    pairs = values.reshape([-1, 2, *values.shape[1:]])  # [B / 2, 2, ...]
    return pairs.flip(axis=1).reshape(values.shape)  # [B, ...]
