"""Quality by class of an evaluation: its counts, its calibration, and the table for evaluation.json and CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from vit_static.common.io import write_text
from vit_static.common.text import csv_row
from vit_static.report.calibration import Calibration, calibration_of
from vit_static.report.class_metrics import ClassCounts, average_precision
from vit_static.report.predictions import Predictions


class ClassQuality(BaseModel):
    """The quality of one class; shares are 0-1."""

    label: int
    name: str
    support: int  # images with this label
    precision: float
    recall: float
    f1: float
    average_precision: float | None = None  # with several labels per image; None for a class without images


def class_counts(predictions: Predictions, threshold: float, num_classes: int = 0) -> ClassCounts | None:
    """Count the images of each class that occurs, and of at least the first `num_classes`.

    With several labels, a class is predicted from the probability `threshold` on. Returns None where neither one label
    per image nor labels and logits of all classes are known.
    """
    if predictions.labels is not None:
        num_classes = max(num_classes, 1 + int(max(predictions.labels.max(), predictions.classes.max())))
        return ClassCounts.of_labels(predictions.labels, predictions.classes, num_classes)
    if predictions.is_label is None or predictions.logits is None:
        return None
    return ClassCounts.of_several_labels(predictions.is_label, predictions.logits >= _logit(threshold))


def calibration(predictions: Predictions) -> Calibration:
    """Return the reliability diagram of the top class's probability or, with logits, of those of all classes.

    With logits each pair of image and class is a prediction, which is correct if the image has this label.
    """
    if predictions.is_label is None or predictions.logits is None:
        return calibration_of(predictions.probabilities, predictions.label_ranks < 1)
    with np.errstate(over="ignore"):
        probabilities = 1.0 / (1.0 + np.exp(-predictions.logits))
    return calibration_of(probabilities, predictions.is_label)


def class_quality(
    predictions: Predictions, class_names: Sequence[str], num_classes: int, threshold: float
) -> list[ClassQuality] | None:
    """Return the quality of every class, in label order; None where `class_counts` is."""
    counts = class_counts(predictions, threshold, num_classes)
    if counts is None:
        return None
    average_precisions: list[float | None] = [None] * num_classes
    if predictions.is_label is not None and predictions.logits is not None:
        average_precisions = [
            value if math.isfinite(value) else None
            for value in average_precision(predictions.is_label, predictions.logits).tolist()
        ]
    columns = (values.tolist() for values in (counts.support, counts.precision, counts.recall, counts.f1))
    return [
        ClassQuality(
            label=label,
            name=class_names[label] if label < len(class_names) else str(label),
            support=support,
            precision=precision,
            recall=recall,
            f1=f1,
            average_precision=class_average_precision,
        )
        for label, (support, precision, recall, f1, class_average_precision) in enumerate(
            zip(*columns, average_precisions, strict=True)
        )
    ]


def write_class_quality(classes: Sequence[ClassQuality], path: Path) -> None:
    """Write the table as CSV, one line per class."""
    has_average_precision = any(each.average_precision is not None for each in classes)
    columns = ["label", "name", "support", "precision", "recall", "f1"]
    columns += ["average_precision"] if has_average_precision else []
    rows = [columns, *([getattr(each, column) for column in columns] for each in classes)]
    write_text("".join(f"{csv_row(row)}\n" for row in rows), path)


def _logit(probability: float) -> float:
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability / (1.0 - probability))
