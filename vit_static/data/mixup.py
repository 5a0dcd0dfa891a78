"""Training images mixed with each other, on the device, before the compiled step: mixup and CutMix.

Neighbours in a batch are mixed with each other, two and two: whichever ranks share a batch, an image's partner is the
same, and so is the share, which is drawn for the whole global batch from the seed and the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F

from vit_static.config.schema import AugmentConfig
from vit_static.data.sampler import mixup_generator


@dataclass(frozen=True)
class Mixup:
    """What a run does to a training batch after it has been fed and before the step, if anything."""

    augment: AugmentConfig
    num_classes: int
    seed: int

    def __call__(self, batch: tuple[paddle.Tensor, ...], step: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Images [B, 3, height, width] with labels, [B] or [B, num_classes] of zeros and ones, for the update after
        `step` done ones: as they are where nothing is mixed, else mixed ones and targets [B, num_classes] float32."""
        images, labels = batch
        if self.augment.mixup_alpha == 0.0 and self.augment.cutmix_alpha == 0.0:
            return images, labels
        targets = F.one_hot(labels, self.num_classes) if labels.ndim == 1 else labels.astype("float32")
        return mixed(images, targets, draw_mix(self.augment, tuple(images.shape[2:]), self.seed, step))


@dataclass(frozen=True)
class Mix:
    """What is done to a batch: an image keeps `share` of itself (0-1), everywhere, or whole but for a box that is cut
    out of its partner (top, bottom, left, right, in pixels)."""

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(augment: AugmentConfig, image_size: tuple[int, int], seed: int, step: int) -> Mix:
    """A step's mixing, the same on every rank.

    mixup: arXiv 1710.09412. CutMix: arXiv 1905.04899, with the share that the box, cut off at the image's borders,
    really leaves. Where both are on, one is chosen a batch, and one share is drawn a batch, as in DeiT's recipe.
    """
    generator = mixup_generator(seed, step)
    is_mixed, is_cutmix = generator.random(2) < (augment.mix_probability, augment.mixup_switch_prob)
    if not is_mixed:
        return Mix(1.0)
    if augment.cutmix_alpha == 0.0 or (augment.mixup_alpha > 0.0 and not is_cutmix):
        return Mix(float(generator.beta(augment.mixup_alpha, augment.mixup_alpha)))
    height, width = image_size
    side = math.sqrt(1.0 - generator.beta(augment.cutmix_alpha, augment.cutmix_alpha))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = generator.integers(height), generator.integers(width)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    box = (int(top), int(bottom), int(left), int(right))
    return Mix(1.0 - (bottom - top) * (right - left) / (height * width), box)


def mixed(images: paddle.Tensor, targets: paddle.Tensor, mix: Mix) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Images [B, 3, height, width] and targets [B, num_classes], B even, each with its neighbour's; new tensors."""
    if mix.share == 1.0:
        return images, targets
    targets = mix.share * targets + (1.0 - mix.share) * _partners(targets)
    if mix.box is None:
        return mix.share * images + (1.0 - mix.share) * _partners(images), targets
    top, bottom, left, right = mix.box
    cut = images.clone()
    cut[:, :, top:bottom, left:right] = _partners(images[:, :, top:bottom, left:right])
    return cut, targets


def _partners(values: paddle.Tensor) -> paddle.Tensor:
    """[B, ...] in the order 1, 0, 3, 2, ..."""
    pairs = values.reshape([-1, 2, *values.shape[1:]])
    return pairs.flip(axis=1).reshape(values.shape)
