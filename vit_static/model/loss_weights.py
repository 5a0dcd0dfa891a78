"""Weights of the classes in the training loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LossWeights:
    """Weights [num_classes], float32: of the images of each class, and of the positives of each binary loss."""

    classes: np.ndarray | None = None
    positives: np.ndarray | None = None


NO_WEIGHTS = LossWeights()


def balanced_class_weights(counts: np.ndarray) -> np.ndarray:
    """Return n / (K * n_k) for the numbers of images n_k of K classes, all above 0, which sum to n.

    These are the weights of scikit-learn's `compute_class_weight("balanced")`. Over the training images their mean
    is 1.
    """
    return counts.sum() / (len(counts) * counts)


def balanced_pos_weights(counts: np.ndarray, num_images: int) -> np.ndarray:
    """Return negatives / positives of each class, as the documentation of torch's BCEWithLogitsLoss recommends.

    `counts` are the numbers of images of the classes, all above 0.
    """
    return (num_images - counts) / counts


def mean_image_weight(label_images: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Return the mean, over the images with labels, of the mean weight of an image's classes.

    `labels` are the classes of all labels, and `label_images` the images that have them.
    """
    sums, counts = np.bincount(label_images, weights[labels]), np.bincount(label_images)
    return float((sums[counts > 0] / counts[counts > 0]).mean())
