"""Losses and evaluation metrics computed from logits."""

from __future__ import annotations

from typing import Literal

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.config.data_schema import LossConfig

_RANK_OF_NAN = 1e6  # beyond every class


def per_image_loss(logits: paddle.Tensor, labels: paddle.Tensor, loss: LossConfig) -> paddle.Tensor:
    """Compute losses [B] (float32) from logits [B, K] and labels [B] (int64) or targets y [B, K] (float32, 0 to 1).

    With label smoothing e, `loss.name` means:
    softmax: cross-entropy with targets y * (1 - e) + e / K.
    sigmoid: binary cross-entropy summed over the classes, with targets y * (1 - e) + e (PLSC's ViTCELoss).
    bce: binary cross-entropy averaged over the classes, with the targets of softmax (DeiT III).
    With `target_threshold` t, sigmoid and bce replace y by y > t before smoothing.

    On a CPU, Paddle's softmax clamps logits that are more than 64 below the largest. The loss of such an image is too
    small; its gradient is correct.
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


def label_ranks(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Compute the rank of the label among the classes, [B] float32: 0 is correct top-1, 0 to 4 correct top-5.

    `labels` are [B], or [B, K] with zeros and ones, of which the best rank counts. Of equal scores the lower class
    comes first, as in `argmax`. An image with a NaN score is never correct.
    """
    logits = logits.astype("float32")
    num_classes = logits.shape[-1]
    classes = paddle.arange(num_classes).unsqueeze(0)  # [1, K]
    if labels.ndim == 1:
        label = labels.unsqueeze(-1)  # [B, 1]
        score = paddle.take_along_axis(logits, label, axis=1)  # [B, 1]
    else:
        is_label = labels > 0.5
        score = paddle.where(is_label, logits, paddle.full_like(logits, -float("inf"))).max(axis=-1, keepdim=True)
        is_best = is_label & (logits == score)
        label = paddle.where(is_best, classes, paddle.full_like(classes, num_classes)).min(axis=-1, keepdim=True)
    is_behind = (logits < score) | ((logits == score) & (classes >= label))
    ranks = num_classes - is_behind.astype("float32").sum(axis=-1)
    return ranks + _RANK_OF_NAN * paddle.isnan(logits).astype("float32").sum(axis=-1)


def top1_predictions(
    logits: paddle.Tensor, name: Literal["softmax", "sigmoid", "bce"]
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Compute the most probable class and its probability, [B] float32 each (exact for class numbers below 2**24).

    `name` is the loss's: softmax gives softmax probabilities, the others sigmoid.
    """
    logits = logits.astype("float32")
    probabilities = F.softmax(logits, axis=-1) if name == "softmax" else F.sigmoid(logits)
    return logits.argmax(axis=-1).astype("float32"), probabilities.max(axis=-1)


class Criterion(nn.Layer):
    """Loss in training, metrics per image in evaluation.

    In training: the mean loss. In evaluation: [B, 4] with the loss without label smoothing, the label's rank, the most
    probable class, and its probability.
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
        ranks = label_ranks(logits, labels)
        return paddle.stack([losses, ranks, *top1_predictions(logits, self._eval_loss.name)], axis=1)
