"""Metrics by class: precision, recall, F1, average precision, and the thresholds that maximize F1.

Shares are 0-1. With several labels per image, an image is predicted as every class whose probability reaches the
class's threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassCounts:
    """Number of images per class, each [num_classes] int64."""

    num_correct: np.ndarray  # of the class, and predicted as it
    num_predicted: np.ndarray
    support: np.ndarray  # of the class

    @classmethod
    def of_labels(cls, labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> ClassCounts:
        """Count images with one label and one predicted class each, [num_images] int64."""
        correct = labels[labels == predicted]
        return cls(*(np.bincount(values, minlength=num_classes) for values in (correct, predicted, labels)))

    @classmethod
    def of_several_labels(cls, is_label: np.ndarray, is_predicted: np.ndarray) -> ClassCounts:
        """Count images with several labels and predicted classes each, [num_images, num_classes] bool."""
        return cls(
            *(values.sum(axis=0, dtype=np.int64) for values in (is_label & is_predicted, is_predicted, is_label))
        )

    @property
    def precision(self) -> np.ndarray:
        """The share of the images predicted as a class that are of it; 0 if there are none."""
        return self.num_correct / np.maximum(self.num_predicted, 1)

    @property
    def recall(self) -> np.ndarray:
        """The share of a class's images that are predicted as it; 0 if it has none."""
        return self.num_correct / np.maximum(self.support, 1)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of precision and recall; 0 for a class that neither occurs nor is predicted."""
        return 2.0 * self.num_correct / np.maximum(self.num_predicted + self.support, 1)

    def macro(self, values: np.ndarray) -> float:
        """Return the mean over the classes that occur among the labels or predictions, as scikit-learn does."""
        occurs = self.num_predicted + self.support > 0
        return float(values[occurs].mean()) if occurs.any() else 0.0

    def micro(self) -> ClassCounts:
        """Return the counts of all classes together, each [1]."""
        return ClassCounts(*(values.sum(keepdims=True) for values in vars(self).values()))

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have images."""
        return float(self.recall[self.support > 0].mean())


def average_precision(is_label: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, [num_classes] float64; NaN for a class without images.

    `is_label` is [num_images, num_classes] bool, `scores` of the same shape. The definition is scikit-learn's: the sum
    over all thresholds, from the highest on, of the precision times the increase in recall; images with the same score
    are added together. An image with a NaN score comes last.
    """
    values = np.full(scores.shape[1], np.nan)
    for label in np.flatnonzero(is_label.any(axis=0)):
        positives, predicted, _ = _cumulative_counts(is_label[:, label], scores[:, label])
        values[label] = (np.diff(positives, prepend=0) / positives[-1] * (positives / predicted)).sum()
    return values


def max_f1_thresholds(is_label: np.ndarray, probabilities: np.ndarray, default: float) -> np.ndarray:
    """Return for each class the threshold with the highest F1 on these images, [num_classes] float64.

    `is_label` is [num_images, num_classes] bool, `probabilities` of the same shape, 0-1. A threshold lies halfway
    between the lowest probability that is accepted and the next lower one. Of several with the same F1 it is the one
    nearest to `default`, which classes without images get.
    """
    thresholds = np.full(probabilities.shape[1], default)
    for label in np.flatnonzero(is_label.any(axis=0)):
        positives, predicted, accepted = _cumulative_counts(is_label[:, label], probabilities[:, label])
        f1 = 2.0 * positives / (predicted + positives[-1])
        candidates = (accepted + np.append(accepted[1:], 0.0)) / 2.0
        candidates = candidates[f1 == f1.max()]
        thresholds[label] = candidates[np.abs(candidates - default).argmin()]
    return thresholds


def _cumulative_counts(is_label: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each distinct score from the highest on, the images of the class and all images with that score or a
    higher one, and the score; [number of distinct scores] each."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-scores, kind="stable")
    lasts = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    return np.cumsum(is_label[order])[lasts], lasts + 1, scores[order][lasts]
