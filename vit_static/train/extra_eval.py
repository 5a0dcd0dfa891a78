"""Evaluation on further validation sets (eval.also): top-1, top-5, and ImageNet-C's mean corruption error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from vit_static.common.errors import DataError
from vit_static.common.text import counted
from vit_static.data.extra_sets import ExtraSet, mean_corruption_errors
from vit_static.data.image_set import ImageDataset
from vit_static.data.loader import EvalLoader
from vit_static.parallel.mesh import Mesh
from vit_static.program.program import Program


@dataclass(frozen=True)
class ExtraResult:
    """The result on one set, in per cent. ImageNet-C's top-1 is the mean over its corruptions."""

    name: str
    num_images: int
    top1: float
    top5: float
    num_classes: int | None = None  # among which predictions were chosen; None: all
    mce: float | None = None  # ImageNet-C's mean corruption error
    mean_error: float | None = None  # the same without AlexNet's errors as denominators

    def values(self) -> dict[str, Any]:
        """Return what is defined, by name, without the name of the set."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "name"}

    def describe(self, num_classes: int) -> str:
        """Return one line for people; `num_classes` are the model's, of which at most five have no top-5."""
        text = f"{self.name}: top-1 {self.top1:.2f} %" + (f"  top-5 {self.top5:.2f} %" if num_classes > 5 else "")
        if self.mce is not None:
            text += f"  mCE {self.mce:.2f} %"
        elif self.mean_error is not None:
            text += f"  mean corruption error {self.mean_error:.2f} %, not divided by AlexNet's"
        among = "" if self.num_classes is None else f", among {counted(self.num_classes, 'class')}"
        return f"{text}  over {counted(self.num_images, 'image')}{among}"


def evaluate_extra_sets(
    program: Program,
    sets: Sequence[ExtraSet],
    mesh: Mesh,
    make_loader: Callable[[ImageDataset, bool], EvalLoader],
) -> list[ExtraResult]:
    """Evaluate the program, which returns logits, on each set. All ranks call it together and get the same results.

    `make_loader` maps a part of a set, and whether its images have several labels, to its loader. Raises DataError, the
    same on all ranks, where one of them can't read an image.
    """
    results = []
    for extra in sets:
        shares = {
            part: _top_shares(program, extra, make_loader(images, extra.has_several_labels), mesh)
            for part, images in extra.parts.items()
        }
        mean_error = mce = None
        if extra.is_corrupted:
            mean_error, mce = mean_corruption_errors({part: top1 for part, (top1, _) in shares.items()})
        top5 = float(np.mean([each for _, each in shares.values()]))
        result = ExtraResult(
            name=extra.name,
            num_images=extra.num_images,
            top1=100.0 * (shares[""][0] if mean_error is None else 1.0 - mean_error),
            top5=100.0 * top5,
            num_classes=None if extra.classes is None else len(extra.classes),
            mce=None if mce is None else 100.0 * mce,
            mean_error=None if mean_error is None else 100.0 * mean_error,
        )
        results.append(result)
    return results


def _top_shares(program: Program, extra: ExtraSet, loader: EvalLoader, mesh: Mesh) -> tuple[float, float]:
    """Return the shares of the images whose label is the most probable class, and among the five most probable."""
    totals = np.zeros(3)  # images, correct top-1, correct top-5
    problem = None
    try:
        for images, labels, weights in loader:
            is_real = np.asarray(weights) > 0
            unused = paddle.zeros([images.shape[0]], "int64")  # the labels that the program expects
            logits = program.eval_step(images, unused)[is_real, 4:]
            hits = top_hits(logits, np.asarray(labels)[is_real], extra.classes)
            totals += [is_real.sum(), *hits.sum(axis=0)]
    except DataError as error:
        problem = str(error)
    problem = mesh.first_non_none(problem)
    if problem is not None:
        raise DataError(problem)
    count, top1, top5 = mesh.all_reduce_sum(totals)
    assert count == len(loader.images)
    return float(top1 / count), float(top5 / count)


def top_hits(logits: np.ndarray, labels: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """Return whether the most probable class, and one of the five most probable, is a label of the image: [B, 2] bool.

    `logits` are [B, K], `labels` [B], or [B, K] with 1 for each label of an image. With `classes` only these labels are
    predicted. Of equal logits the lower class comes first. An image with a NaN is never correct.
    """
    allowed = np.arange(logits.shape[1]) if classes is None else np.sort(classes)
    order = np.argsort(-logits[:, allowed], axis=1, kind="stable")[:, :5]
    predicted = allowed[order]  # [B, 5]
    is_hit = predicted == labels[:, None] if labels.ndim == 1 else np.take_along_axis(labels, predicted, axis=1) > 0
    is_hit &= ~np.isnan(logits).any(axis=1, keepdims=True)
    return np.stack([is_hit[:, 0], is_hit.any(axis=1)], axis=1)
