"""Error analysis of an evaluation, stored as evaluation.json: confusions, worst classes, worst images."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field

from vit_static.common.io import write_text
from vit_static.common.text import to_unicode
from vit_static.report.calibration import Calibration
from vit_static.report.class_quality import ClassQuality, calibration, class_quality
from vit_static.report.predictions import Predictions

EVALUATION_FILE = "evaluation.json"  # in the folder of a run: the analysis of its last evaluation
MAX_CONFUSIONS, MAX_CLASSES, MAX_IMAGES = 20, 20, 16
MAX_MATRIX_CLASSES = 50  # a larger confusion matrix is unreadable
THUMBNAIL_SIZE = 128  # pixels of the longer side

Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/=]*$")]


@dataclass(frozen=True)
class Sample:
    """An image of the data set."""

    path: str  # below the root of the data set
    encoded: np.ndarray | None  # a file of it, uint8, as DALI gets it; None if it can't be read
    labels: np.ndarray | None


class Confusion(BaseModel):
    """The number of images of one class that were predicted as another."""

    label: int
    predicted: int
    num_images: int


class ClassAccuracy(BaseModel):
    """The accuracy of one class."""

    label: int
    num_images: int
    num_correct: int


class MisclassifiedImage(BaseModel):
    """An image whose prediction is wrong. None stands for a value that isn't finite."""

    path: str
    labels: list[int]
    predicted: int
    probability: float | None
    loss: float | None
    thumbnail: Base64  # a JPEG file; empty if the image can't be read


class CorrectImage(BaseModel):
    """A correctly classified image, to compare a misclassified one with."""

    path: str
    label: int
    probability: float | None
    thumbnail: Base64  # as in MisclassifiedImage


class ErrorAnalysis(BaseModel):
    """The content of evaluation.json.

    If images may have several labels, a prediction is correct if it is one of them, and the analysis of confusions is
    None: it isn't known which of the labels the model mistook.
    """

    format: Literal[1] = 1
    step: int
    is_ema: bool  # the moving average of the weights was evaluated, not the weights
    num_images: int
    num_correct: int
    num_classes: int
    class_names: dict[int, str]  # only of the classes mentioned here
    confusions: list[Confusion] | None  # the most frequent first
    matrix: list[list[int]] | None  # number of images by label and predicted class; None for many classes
    classes: list[ClassAccuracy] | None  # the classes with the lowest accuracy, worst first
    images: list[MisclassifiedImage]  # the ones with the highest loss, highest first
    examples: list[CorrectImage] = []  # at most one per class of `images`
    per_class: list[ClassQuality] | None = None  # of every class; None if an earlier version has written the file
    calibration: Calibration | None = None  # None likewise

    @property
    def has_several_labels(self) -> bool:
        return self.classes is None

    def write(self, path: Path) -> None:
        """Write the analysis as JSON, atomically."""
        write_text(self.model_dump_json() + "\n", path)


def worst_images(predictions: Predictions) -> np.ndarray:
    """Return the indices of the MAX_IMAGES misclassified images with the highest loss; NaN counts as the highest."""
    wrong = np.flatnonzero(predictions.label_ranks >= 1)
    losses = np.nan_to_num(predictions.losses[wrong], nan=np.inf, posinf=np.inf)
    return wrong[np.argsort(-losses, kind="stable")[:MAX_IMAGES]]


def example_images(predictions: Predictions, worst: np.ndarray) -> np.ndarray:
    """Return the index of a correctly classified image for each class that the images `worst` have or are mistaken for.

    It is the one with the highest probability; a class without a correct prediction has none.
    """
    named = [predictions.classes[worst], *([] if predictions.labels is None else [predictions.labels[worst]])]
    probabilities, is_correct = np.nan_to_num(predictions.probabilities, nan=-1.0), predictions.label_ranks < 1
    indices = []
    for label in np.unique(np.concatenate(named)):
        of_class = np.flatnonzero((predictions.classes == label) & is_correct)
        if len(of_class):
            indices.append(of_class[np.argmax(probabilities[of_class])])
    return np.array(indices, np.int64)


def analyze_errors(
    predictions: Predictions,
    class_names: Sequence[str],
    num_classes: int,
    worst: Sequence[Sample],
    step: int,
    is_ema: bool,
    threshold: float = 0.5,
    examples: Sequence[Sample] = (),
) -> ErrorAnalysis:
    """Analyse the errors of an evaluation. `worst` are the images of `worst_images`, in the same order, and `examples`
    those of `example_images`, or none.

    `threshold`: the probability from which a class is predicted, if images may have several labels.
    """
    confusions = matrix = classes = None
    named: set[int] = set()
    if predictions.labels is not None:
        pairs = predictions.labels * num_classes + predictions.classes
        confusions = _confusions(pairs[predictions.labels != predictions.classes], num_classes)
        classes = _worst_classes(predictions.labels, predictions.label_ranks < 1, num_classes)
        if num_classes <= MAX_MATRIX_CLASSES:
            matrix = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).tolist()
            named |= set(range(num_classes))
        named |= {label for confusion in confusions for label in (confusion.label, confusion.predicted)}
        named |= {accuracy.label for accuracy in classes}
    worst_indices = worst_images(predictions)
    images = [
        MisclassifiedImage(
            path=to_unicode(sample.path),
            labels=[] if sample.labels is None else sample.labels.tolist(),
            predicted=int(predictions.classes[index]),
            probability=_finite_or_none(predictions.probabilities[index]),
            loss=_finite_or_none(predictions.losses[index]),
            thumbnail="" if sample.encoded is None else _thumbnail(sample.encoded),
        )
        for index, sample in zip(worst_indices, worst, strict=True)
    ]
    correct_images = [
        CorrectImage(
            path=to_unicode(sample.path),
            label=int(predictions.classes[index]),
            probability=_finite_or_none(predictions.probabilities[index]),
            thumbnail="" if sample.encoded is None else _thumbnail(sample.encoded),
        )
        for index, sample in zip(example_images(predictions, worst_indices) if examples else (), examples, strict=True)
    ]
    named |= {label for image in images for label in (*image.labels, image.predicted)}
    named |= {image.label for image in correct_images}
    return ErrorAnalysis(
        step=step,
        is_ema=is_ema,
        num_images=len(predictions.label_ranks),
        num_correct=int((predictions.label_ranks < 1).sum()),
        num_classes=num_classes,
        class_names={label: class_names[label] for label in sorted(named) if label < len(class_names)},
        confusions=confusions,
        matrix=matrix,
        classes=classes,
        images=images,
        examples=correct_images,
        per_class=class_quality(predictions, class_names, num_classes, threshold),
        calibration=calibration(predictions),
    )


def _confusions(pairs: np.ndarray, num_classes: int) -> list[Confusion]:
    """Count the pairs (label * num_classes + predicted class) of the misclassified images."""
    unique_pairs, counts = np.unique(pairs, return_counts=True)
    top = np.argsort(-counts, kind="stable")[:MAX_CONFUSIONS]
    return [
        Confusion(label=pair // num_classes, predicted=pair % num_classes, num_images=count)
        for pair, count in zip(unique_pairs[top].tolist(), counts[top].tolist(), strict=True)
    ]


def _worst_classes(labels: np.ndarray, is_correct: np.ndarray, num_classes: int) -> list[ClassAccuracy]:
    """Return the classes with the lowest accuracy; with the same accuracy, larger classes come first."""
    num_images = np.bincount(labels, minlength=num_classes)
    num_correct = np.bincount(labels[is_correct], minlength=num_classes)
    order = np.lexsort((-num_images, num_correct / np.maximum(num_images, 1)))
    order = order[num_images[order] > 0][:MAX_CLASSES]
    return [
        ClassAccuracy(label=int(label), num_images=int(num_images[label]), num_correct=int(num_correct[label]))
        for label in order
    ]


def _finite_or_none(value: np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None


def _thumbnail(encoded: np.ndarray) -> str:
    from vit_static.common.drawing import thumbnail

    try:
        return base64.b64encode(thumbnail(encoded.tobytes(), THUMBNAIL_SIZE)).decode()
    except Exception:  # Pillow raises many types of errors for files that only DALI can decode
        return ""
