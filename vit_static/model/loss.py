"""Losses and evaluation metrics computed from logits."""

from __future__ import annotations

from typing import Literal

import paddle
import paddle.nn.functional as F
from paddle import nn

from vit_static.config.data_schema import LossConfig
from vit_static.model.loss_weights import NO_WEIGHTS, LossWeights

_RANK_OF_NAN = 1e6  # beyond every class
_MIN_PROBABILITY = 1e-7  # the gradient of x^gamma is infinite at 0 where gamma is below 1


def per_image_loss(
    logits: paddle.Tensor, labels: paddle.Tensor, loss: LossConfig, weights: LossWeights = NO_WEIGHTS
) -> paddle.Tensor:
    """Compute losses [B] (float32) from logits [B, K] and labels [B] (int64) or targets y [B, K] (float32, 0 to 1).

    With label smoothing e, `loss.name` means:
    softmax: cross-entropy with targets y * (1 - e) + e / K.
    sigmoid: binary cross-entropy summed over the classes, with targets y * (1 - e) + e (PLSC's ViTCELoss).
    bce: binary cross-entropy averaged over the classes, with the targets of softmax (DeiT III).
    With `target_threshold` t, sigmoid and bce replace y by y > t before smoothing.

    Class weights multiply the terms of softmax's sum over the classes, as in torch's CrossEntropyLoss; for sigmoid and
    bce they weigh the images, by the mean weight of an image's classes (arXiv 1901.05555). Weights of positives are
    torch's `pos_weight` (BCEWithLogitsLoss). `focal_gamma` g multiplies the term of a class whose probability is p by
    (1 - p)^g, and that of a negative by p^g (arXiv 1708.02002).

    On a CPU, Paddle's softmax clamps logits that are more than 64 below the largest. The loss of such an image is too
    small; its gradient is correct.
    """
    logits = logits.astype("float32")
    num_classes = logits.shape[-1]
    smoothing, gamma = loss.label_smoothing, loss.focal_gamma
    y = F.one_hot(labels, num_classes) if labels.ndim == 1 else labels  # [B, K]
    class_weights = None if weights.classes is None else paddle.assign(weights.classes)  # [K]
    image_weights = None if class_weights is None or loss.name == "softmax" else _image_weights(y, class_weights)
    if loss.target_threshold is not None:
        y = (y > loss.target_threshold).astype("float32")
    targets = y * (1.0 - smoothing) + (smoothing if loss.name == "sigmoid" else smoothing / num_classes)
    if loss.name == "softmax":
        log_p = F.log_softmax(logits, axis=-1)
        terms = targets * log_p
        if gamma > 0.0:
            terms = terms * (1.0 - log_p.exp()).clip(min=_MIN_PROBABILITY) ** gamma
        if class_weights is not None:
            terms = terms * class_weights
        return -terms.sum(axis=-1)
    log_p, log_q = F.log_sigmoid(logits), F.log_sigmoid(-logits)  # of the class, of its absence
    positives, negatives = targets * log_p, (1.0 - targets) * log_q
    if gamma > 0.0:
        positives, negatives = positives * (gamma * log_q).exp(), negatives * (gamma * log_p).exp()
    if weights.positives is not None:
        positives = positives * paddle.assign(weights.positives)
    losses = -(positives + negatives).sum(axis=-1)
    losses = losses / num_classes if loss.name == "bce" else losses
    return losses if image_weights is None else losses * image_weights


def _image_weights(y: paddle.Tensor, class_weights: paddle.Tensor) -> paddle.Tensor:
    """Compute the mean weight of each image's classes, [B], from targets y [B, K]; 1 without any class."""
    num_labels = y.sum(axis=-1)
    return ((y * class_weights).sum(axis=-1) + 1.0 - num_labels.clip(max=1.0)) / num_labels.clip(min=1.0)


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

    In training: the mean loss. In evaluation: [B, 4] with the loss without label smoothing, weights and focal factors,
    the label's rank, the most probable class, and its probability; with `returns_logits` the logits follow, [B, 4 + K].
    """

    def __init__(self, loss: LossConfig, weights: LossWeights = NO_WEIGHTS, *, returns_logits: bool = False) -> None:
        super().__init__()
        self.returns_logits = returns_logits
        self._train_loss, self._weights = loss, weights
        self._eval_loss = loss.model_copy(update={"label_smoothing": 0.0, "focal_gamma": 0.0})

    def image_losses(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        """Compute the training loss of each image, [B]."""
        return per_image_loss(logits, labels, self._train_loss, self._weights)

    def forward(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        if self.training:
            return self.image_losses(logits, labels).mean()
        losses = per_image_loss(logits, labels, self._eval_loss)
        ranks = label_ranks(logits, labels)
        values = paddle.stack([losses, ranks, *top1_predictions(logits, self._eval_loss.name)], axis=1)
        return paddle.concat([values, logits.astype("float32")], axis=1) if self.returns_logits else values
