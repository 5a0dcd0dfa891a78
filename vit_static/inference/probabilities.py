"""Probabilities from logits, and the classes that a prediction names; needs no Paddle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DEFAULT_TOP_K = 5


def to_probabilities(logits: np.ndarray, activation: str) -> np.ndarray:
    """Return probabilities float64 for logits [B, num_classes]: sigmoid for `sigmoid` and `bce`, else softmax."""
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # NaN stays NaN
        if activation in ("sigmoid", "bce"):
            return 1.0 / (1.0 + np.exp(-logits))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def named_classes(probabilities: np.ndarray, top_k: int | None, thresholds: Sequence[float] | None) -> list[int]:
    """Return the classes that a prediction names, for probabilities [num_classes], the most probable first.

    These are the `top_k` most probable ones. Without `top_k` they are all classes that reach their threshold, which may
    be none, or if there are no thresholds the DEFAULT_TOP_K most probable ones.
    """
    order = np.argsort(-probabilities, kind="stable")
    if top_k is None and thresholds is not None:
        return [label for label in order.tolist() if probabilities[label] >= thresholds[label]]
    classes: list[int] = order[: top_k or DEFAULT_TOP_K].tolist()
    return classes
