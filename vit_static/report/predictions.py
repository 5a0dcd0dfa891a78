"""A model's predictions for a data set, as its evaluation collects them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for all images of a data set, in its order. Each array is [num_images], but the last two.

    Of images with several labels, which are evaluated by class, logits and labels of every class are kept: 5 bytes per
    image and class, 250 MB for 50,000 images of 1,000 classes.
    """

    losses: np.ndarray
    label_ranks: np.ndarray  # number of classes with a higher score than the label: 0 if the prediction is correct
    classes: np.ndarray  # int64, the class with the highest score
    probabilities: np.ndarray  # of that class, 0-1
    labels: np.ndarray | None  # int64; None if images may have several labels
    logits: np.ndarray | None = None  # [num_images, num_classes] float32
    is_label: np.ndarray | None = None  # [num_images, num_classes] bool
