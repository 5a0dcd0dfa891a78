"""Calibration of probabilities: reliability diagram, expected calibration error, temperature (arXiv 1706.04599)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel

NUM_BINS = 15  # of equal width, as in the paper
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_CHUNK_VALUES = 1 << 22  # logits that are converted to float64 at once


class CalibrationBin(BaseModel):
    """The predictions whose confidence lies in one bin; the means are 0 if there are none."""

    num_predictions: int
    confidence: float  # mean, 0-1
    accuracy: float  # share of correct predictions


class Calibration(BaseModel):
    """A reliability diagram: bins of equal width from 0 to 1, a confidence on an edge in the lower one."""

    bins: list[CalibrationBin]

    @property
    def ece(self) -> float:
        """The expected calibration error, 0-1: the mean of |accuracy - confidence| over the predictions."""
        total = sum(each.num_predictions for each in self.bins)
        return sum(each.num_predictions * abs(each.accuracy - each.confidence) for each in self.bins) / max(total, 1)


def calibration_of(confidences: np.ndarray, is_correct: np.ndarray, num_bins: int = NUM_BINS) -> Calibration:
    """Return the reliability diagram of predictions with confidences 0-1, both of the same shape.

    Confidences that aren't finite are left out.
    """
    is_finite = np.isfinite(confidences)
    confidences, is_correct = confidences[is_finite].astype(np.float64), is_correct[is_finite]
    numbers = np.clip(np.ceil(confidences * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    counts = np.bincount(numbers, minlength=num_bins)
    confidence_sums = np.bincount(numbers, confidences, num_bins)
    correct_sums = np.bincount(numbers, is_correct, num_bins)
    return Calibration(
        bins=[
            CalibrationBin(
                num_predictions=int(count), confidence=confidence / max(count, 1), accuracy=correct / max(count, 1)
            )
            for count, confidence, correct in zip(
                counts.tolist(), confidence_sums.tolist(), correct_sums.tolist(), strict=True
            )
        ]
    )


def fit_temperature(logits: np.ndarray, targets: np.ndarray, activation: str) -> float:
    """Return the T by which logits are to be divided for the lowest negative log-likelihood on these images.

    `logits` are [num_images, num_classes]. `targets` are labels [num_images] int64 for softmax, or [num_images,
    num_classes] bool for the sigmoids (`sigmoid`, `bce`). T is between MIN_TEMPERATURE and MAX_TEMPERATURE; it is at
    the lower bound if the model makes no error, since more confidence is then always better.

    The loss is convex in 1 / T. Newton's method finds the zero of its derivative, with bisection where a step would
    leave the interval that is known to contain it.
    """
    slopes: _Slopes = _softmax_slopes if activation == "softmax" else _sigmoid_slopes
    low, high = 1.0 / MAX_TEMPERATURE, 1.0 / MIN_TEMPERATURE
    scale = 1.0
    for _ in range(60):
        first, second = _sum_slopes(slopes, logits, targets, scale)
        low, high = (scale, high) if first < 0.0 else (low, scale)
        step = scale - first / second if second > 0.0 else math.inf
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - scale) <= 1e-6 * scale:
            break
        scale = following
    return 1.0 / scale


# From logits [B, num_classes] float64, their targets and a scale to the summed loss's first and second derivative.
_Slopes = Callable[[np.ndarray, np.ndarray, float], tuple[float, float]]


def _sum_slopes(slopes: _Slopes, logits: np.ndarray, targets: np.ndarray, scale: float) -> tuple[float, float]:
    rows = max(_CHUNK_VALUES // logits.shape[1], 1)
    sums = [
        slopes(logits[start : start + rows].astype(np.float64), targets[start : start + rows], scale)
        for start in range(0, len(logits), rows)
    ]
    return sum(first for first, _ in sums), sum(second for _, second in sums)


def _softmax_slopes(logits: np.ndarray, labels: np.ndarray, scale: float) -> tuple[float, float]:
    """Of -log softmax(scale * z)[y]: the mean of z under the model minus z[y], and its variance under the model."""
    powers = np.exp(scale * (logits - logits.max(axis=1, keepdims=True)))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    means = (probabilities * logits).sum(axis=1)
    variances = (probabilities * (logits - means[:, None]) ** 2).sum(axis=1)
    return float((means - logits[np.arange(len(labels)), labels]).sum()), float(variances.sum())


def _sigmoid_slopes(logits: np.ndarray, is_label: np.ndarray, scale: float) -> tuple[float, float]:
    """Of the binary cross-entropy of sigmoid(scale * z), summed over the classes."""
    probabilities = 0.5 * (1.0 + np.tanh(0.5 * scale * logits))
    variances = probabilities * (1.0 - probabilities)
    return float(((probabilities - is_label) * logits).sum()), float((variances * logits**2).sum())
