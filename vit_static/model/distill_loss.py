"""Losses of distillation, and the training loss that contains one."""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.config.data_schema import LossConfig
from vit_static.config.distill_schema import DistillConfig
from vit_static.model.loss import Criterion, per_image_loss

_SMOOTH_L1_BETA = 2.0  # of arXiv 2205.14141
_EPSILON = 1e-6


def soft_label_loss(logits: paddle.Tensor, teacher_logits: paddle.Tensor, temperature: float) -> paddle.Tensor:
    """Compute T^2 KL(softmax(teacher / T) || softmax(student / T)), [B], from logits [B, K] (arXiv 1503.02531).

    This is equation 2 of DeiT (arXiv 2012.12877). Its code divides by the number of classes K as well.
    """
    log_p = F.log_softmax(logits.astype("float32") / temperature, axis=-1)
    log_q = F.log_softmax(teacher_logits.astype("float32") / temperature, axis=-1)
    return (log_q.exp() * (log_q - log_p)).sum(axis=-1) * temperature**2


def hard_label_loss(logits: paddle.Tensor, teacher_logits: paddle.Tensor) -> paddle.Tensor:
    """Compute the cross-entropy with the teacher's most probable class, [B], from logits [B, K] (DeiT, equation 3)."""
    return per_image_loss(logits, teacher_logits.astype("float32").argmax(axis=-1), LossConfig())


def feature_loss(features: paddle.Tensor, teacher_features: paddle.Tensor) -> paddle.Tensor:
    """Compute the mean smooth L1 distance to the teacher's normalized features, [B], from [B, C] each.

    As in feature distillation (arXiv 2205.14141): the teacher's features are normalized over the channels without a
    scale and a shift, the student's are the output of a linear layer, and the distance is quadratic below 2. There it
    is that of all tokens' features, here that of the pooled ones, which models of any resolution have.
    """
    target = teacher_features.astype("float32")
    target = target - target.mean(axis=-1, keepdim=True)
    target = target * paddle.rsqrt((target * target).mean(axis=-1, keepdim=True) + _EPSILON)
    distance = (features.astype("float32") - target).abs()
    near = distance.clip(max=_SMOOTH_L1_BETA)
    return (near * near * (0.5 / _SMOOTH_L1_BETA) + (distance - near)).mean(axis=-1)


class DistillCriterion(nn.Layer):
    """Loss of distillation in training: (1 - weight) * label loss + weight * distillation loss, as DeiT's.

    In training it takes the logits, for `token` and `features` what learns from the teacher (the distillation token's
    logits, the projected features), the teacher's output, and the labels. In evaluation it is its `criterion`.
    `on_parts` gets the two losses per image, [B] each, before their weights.
    """

    def __init__(
        self,
        criterion: Criterion,
        distill: DistillConfig,
        on_parts: Callable[[paddle.Tensor, paddle.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.criterion, self._distill, self.on_parts = criterion, distill, on_parts
        self.returns_logits = criterion.returns_logits

    def forward(self, logits: paddle.Tensor, *others: paddle.Tensor) -> paddle.Tensor:
        *outputs, labels = others
        if not self.training:
            return self.criterion(logits, labels)
        *distilled, teacher = outputs
        label_losses = self.criterion.image_losses(logits, labels)
        distill_losses = self._losses(distilled[0] if distilled else logits, teacher)
        if self.on_parts is not None:
            self.on_parts(label_losses, distill_losses)
        weight = self._distill.weight
        return (label_losses * (1.0 - weight) + distill_losses * weight).mean()

    def _losses(self, output: paddle.Tensor, teacher: paddle.Tensor) -> paddle.Tensor:
        if self._distill.kind == "features":
            return feature_loss(output, teacher)
        if self._distill.has_soft_labels:
            return soft_label_loss(output, teacher, self._distill.temperature)
        return hard_label_loss(output, teacher)
