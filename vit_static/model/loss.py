"""The losses, and what is counted of a batch's logits."""

from __future__ import annotations

from typing import Literal

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.config.schema import LossConfig

_NEVER_A_HIT = 1e6


def per_image_loss(logits: paddle.Tensor, labels: paddle.Tensor, loss: LossConfig) -> paddle.Tensor:
    """Logits [B, K] and labels [B] (int64), or targets y [B, K] (0 to 1, float32), to losses [B], in float32.

    softmax: cross-entropy with targets y * (1 - e) + e / K. sigmoid: binary cross-entropy summed over the classes,
    with targets y * (1 - e) + e as in the seed (its 'ViTCELoss'). bce: its mean over the classes, with softmax's
    targets (DeiT III). With `target_threshold` t both take y > t for y, before they smooth. On a CPU Paddle's softmax
    takes a logit more than 64 below the greatest for 64 below it, so the loss of such an image is too small; its
    gradient is right.
    """
    logits = logits.astype("float32")
    num_classes = logits.shape[-1]
    smoothing = loss.label_smoothing
    y = F.one_hot(labels, num_classes) if labels.ndim == 1 else labels  # [B, K]
    if loss.target_threshold is not None:
        y = (y > loss.target_threshold).astype("float32")
    targets = y * (1.0 - smoothing) + (smoothing if loss.name == "sigmoid" else smoothing / num_classes)
    if loss.name == "softmax":
        return -(targets * F.log_softmax(logits, axis=-1)).sum(axis=-1)
    losses = -(targets * F.log_sigmoid(logits) + (1.0 - targets) * F.log_sigmoid(-logits)).sum(axis=-1)
    return losses / num_classes if loss.name == "bce" else losses


def ranks_of_labels(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """How many classes come before the label, [B] float32: 0 is a top-1 hit, up to 4 a top-5 hit.

    Of several labels, given as [B, K] of zeros and ones, the one that comes first counts. Of equal scores the lower
    class comes first, as `argmax` has it. Scores that are NaN hit nothing.
    """
    logits = logits.astype("float32")
    num_classes = logits.shape[-1]
    classes = paddle.arange(num_classes).unsqueeze(0)  # [1, K]
    if labels.ndim == 1:
        own, label = paddle.take_along_axis(logits, labels.unsqueeze(-1), axis=1), labels.unsqueeze(-1)  # [B, 1]
    else:
        is_label = labels > 0.5
        own = paddle.where(is_label, logits, paddle.full_like(logits, -float("inf"))).max(axis=-1, keepdim=True)
        is_best = is_label & (logits == own)
        label = paddle.where(is_best, classes, paddle.full_like(classes, num_classes)).min(axis=-1, keepdim=True)
    behind = (logits < own) | ((logits == own) & (classes >= label))
    ranks = num_classes - behind.astype("float32").sum(axis=-1)
    return ranks + _NEVER_A_HIT * paddle.isnan(logits).astype("float32").sum(axis=-1)


def first_classes(
    logits: paddle.Tensor, name: Literal["softmax", "sigmoid", "bce"]
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The class that comes first and its probability, by a loss's name, [B] float32 each, which holds every class."""
    logits = logits.astype("float32")
    probabilities = F.softmax(logits, axis=-1) if name == "softmax" else F.sigmoid(logits)
    return logits.argmax(axis=-1).astype("float32"), probabilities.max(axis=-1)


class Criterion(nn.Layer):
    """What the program returns of a batch: training, the mean loss; evaluating, [B, 4] losses, label ranks, and the
    classes that come first with their probabilities.

    The evaluation's loss is the training loss without smoothing.
    """

    def __init__(self, loss: LossConfig) -> None:
        super().__init__()
        self._train_loss = loss
        self._eval_loss = loss.model_copy(update={"label_smoothing": 0.0})

    def forward(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        if self.training:
            losses = per_image_loss(logits, labels, self._train_loss)
            return losses.mean()
        losses = per_image_loss(logits, labels, self._eval_loss)
        ranks = ranks_of_labels(logits, labels)
        return paddle.stack([losses, ranks, *first_classes(logits, self._eval_loss.name)], axis=1)
