"""What a model gets wrong in an evaluation: classes for each other, classes at all, images; a run's evaluation.json."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field

from vit_static.common.io import write_atomically

EVALUATION_FILE = "evaluation.json"  # in a run's folder, of its last evaluation
MAX_CONFUSIONS, MAX_CLASSES, MAX_IMAGES = 20, 20, 16
LARGEST_MATRIX = 50  # classes, beyond which the whole matrix is not for people
THUMBNAIL = 128  # pixels of the longer side

Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/=]*$")]


@dataclass(frozen=True)
class Predictions:
    """What a model says of each image of a set, in the set's order; [num_images] each."""

    losses: np.ndarray
    label_ranks: np.ndarray  # how many classes come before the label: 0 is a hit
    classes: np.ndarray  # the ones that come first, int64
    probabilities: np.ndarray  # of those
    labels: np.ndarray | None  # int64; None where an image may have several


@dataclass(frozen=True)
class Sample:
    """An image for people: where it is below the set's root, its file's bytes and labels where they can be read."""

    path: str
    encoded: np.ndarray | None
    labels: np.ndarray | None


class Confusion(BaseModel):
    """How many images of one class were taken for another."""

    label: int
    predicted: int
    num_images: int


class ClassAccuracy(BaseModel):
    label: int
    num_images: int
    num_correct: int


class MisclassifiedImage(BaseModel):
    path: str
    labels: list[int]
    predicted: int
    probability: float | None  # None: no number
    loss: float | None
    thumbnail: Base64  # a JPEG file; nothing where the image can't be read


class ErrorAnalysis(BaseModel):
    """evaluation.json. Where images may have several labels, a hit is one whose first class is among them, and nothing
    is said of classes: which of the labels was mistaken can't be told."""

    step: int
    is_ema: bool  # of the weights' moving average, not the weights
    num_images: int
    num_correct: int
    num_classes: int
    class_names: dict[int, str]  # of the classes that are named here
    confusions: list[Confusion] | None  # the most frequent first
    matrix: list[list[int]] | None  # images by label and first class, of few classes
    classes: list[ClassAccuracy] | None  # the worst first, of those that have images
    images: list[MisclassifiedImage]  # of those that are no hits the ones with the greatest loss, that first

    def write(self, path: Path) -> None:
        with write_atomically(path) as temporary:
            temporary.write_text(self.model_dump_json() + "\n", encoding="utf-8")


def worst_images(answers: Predictions) -> np.ndarray:
    """By number, of those that are no hits the ones with the greatest loss; what is no number is the greatest."""
    wrong = np.flatnonzero(answers.label_ranks >= 1)
    losses = np.nan_to_num(answers.losses[wrong], nan=np.inf, posinf=np.inf)
    return wrong[np.argsort(-losses, kind="stable")[:MAX_IMAGES]]


def analyze_errors(
    answers: Predictions,
    class_names: Sequence[str],
    num_classes: int,
    worst: Sequence[Sample],
    step: int,
    is_ema: bool,
) -> ErrorAnalysis:
    """`worst` are those of `worst_images`, in its order."""
    confusions = matrix = classes = None
    named: set[int] = set()
    if answers.labels is not None:
        pairs = answers.labels * num_classes + answers.classes
        confusions = _confusions(pairs[answers.labels != answers.classes], num_classes)
        classes = _worst_classes(answers.labels, answers.label_ranks < 1, num_classes)
        if num_classes <= LARGEST_MATRIX:
            matrix = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).tolist()
            named |= set(range(num_classes))
        named |= {number for found in confusions for number in (found.label, found.predicted)}
        named |= {found.label for found in classes}
    images = [
        MisclassifiedImage(
            path=shown.path,
            labels=[] if shown.labels is None else shown.labels.tolist(),
            predicted=int(answers.classes[number]),
            probability=_number(answers.probabilities[number]),
            loss=_number(answers.losses[number]),
            thumbnail="" if shown.encoded is None else _thumbnail(shown.encoded),
        )
        for number, shown in zip(worst_images(answers), worst, strict=True)
    ]
    named |= {number for image in images for number in (*image.labels, image.predicted)}
    return ErrorAnalysis(
        step=step,
        is_ema=is_ema,
        num_images=len(answers.label_ranks),
        num_correct=int((answers.label_ranks < 1).sum()),
        num_classes=num_classes,
        class_names={number: class_names[number] for number in sorted(named) if number < len(class_names)},
        confusions=confusions,
        matrix=matrix,
        classes=classes,
        images=images,
    )


def _confusions(pairs: np.ndarray, num_classes: int) -> list[Confusion]:
    """`pairs` are label * num_classes + first class, of the wrong ones."""
    kinds, counts = np.unique(pairs, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:MAX_CONFUSIONS]
    return [
        Confusion(label=kind // num_classes, predicted=kind % num_classes, num_images=count)
        for kind, count in zip(kinds[most].tolist(), counts[most].tolist(), strict=True)
    ]


def _worst_classes(labels: np.ndarray, hits: np.ndarray, num_classes: int) -> list[ClassAccuracy]:
    """Of equally bad ones those of more images first."""
    num_images = np.bincount(labels, minlength=num_classes)
    num_correct = np.bincount(labels[hits], minlength=num_classes)
    order = np.lexsort((-num_images, num_correct / np.maximum(num_images, 1)))
    order = order[num_images[order] > 0][:MAX_CLASSES]
    return [
        ClassAccuracy(label=int(label), num_images=int(num_images[label]), num_correct=int(num_correct[label]))
        for label in order
    ]


def _number(value: np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None


def _thumbnail(encoded: np.ndarray) -> str:
    from vit_static.common.drawing import thumbnail

    try:
        return base64.b64encode(thumbnail(encoded.tobytes(), THUMBNAIL)).decode()
    except Exception:  # Pillow raises anything of what only DALI can decode
        return ""
