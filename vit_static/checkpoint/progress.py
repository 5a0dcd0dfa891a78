"""Records in a checkpoint: progress, data position, manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import AliasChoices, Field

from vit_static.common.io import FileRecord
from vit_static.config.data_schema import SelectionMetric
from vit_static.data.sampler import nth_batch


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Everything else that a resume needs follows from the step, the seed and the config."""

    step: Annotated[int, Field(ge=0)]  # optimizer steps done
    evaluated_step: int = 0  # the step of the last evaluation
    skipped_batches: tuple[int, ...] = ()  # indices of batches left out after a rollback (train.on_nonfinite)
    metric: str = "top1"  # eval.metric, of which the following are values
    last_value: float | None = None  # of the last evaluation; None if there was none, or it wasn't finite
    # The best value so far and its step. Earlier versions selected by top-1 only.
    best_value: Annotated[float | None, Field(validation_alias=AliasChoices("best_value", "best_top1"))] = None
    best_step: int | None = None
    reference_value: float | None = None  # the last improvement by more than train.min_delta
    num_stale_evals: int = 0  # evaluations since then

    def next_batch_index(self) -> int:
        """Return the index, in the training order, of the batch that comes next."""
        return nth_batch(self.step, self.skipped_batches)

    def after_evaluation(self, metric: SelectionMetric, value: float, min_delta: float) -> Progress:
        """Return the progress after an evaluation at this step that gave `value`.

        A value that isn't finite never improves anything. With another metric than before, the best result and the
        count of evaluations without an improvement begin again.
        """
        past = self if metric == self.metric else Progress(self.step, skipped_batches=self.skipped_batches)
        is_best = improves(metric, value, past.best_value)
        is_improvement = improves(metric, value, past.reference_value, min_delta)
        return replace(
            past,
            evaluated_step=self.step,
            metric=metric,
            last_value=value if math.isfinite(value) else None,
            best_value=value if is_best else past.best_value,
            best_step=self.step if is_best else past.best_step,
            reference_value=value if is_improvement else past.reference_value,
            num_stale_evals=0 if is_improvement else past.num_stale_evals + 1,
        )


def improves(metric: SelectionMetric, value: float, reference: float | None, min_delta: float = 0.0) -> bool:
    """Return whether a value is better than the reference by more than `min_delta`; finite values improve on None."""
    if reference is None or not math.isfinite(value):
        return math.isfinite(value)
    gain = reference - value if metric == "loss" else value - reference
    return gain > min_delta


@dataclass(frozen=True)
class DataPosition:
    """Position in the training order, and what that order was drawn from.

    Which images follow, in which order and how each is augmented are functions of these numbers (data/sampler.py).
    """

    position: int  # index of the next image in the order, over all epochs
    num_images: int
    images_digest: str  # ImageDataset.digest: of names and labels
    seed: int
    repeated_aug: int
    sampler: str = "shuffle"


@dataclass(frozen=True)
class TeacherRecord:
    """The teacher that a run is distilled from."""

    source: str  # the file or checkpoint that its weights are from
    digest: str  # of its weights, its model and its preprocessing


@dataclass(frozen=True)
class KernelRecord:
    """The libraries that compute products on a CPU, which a resumed run keeps (program/cpu/product_choice.py)."""

    machine: str  # what the choices are valid for
    libraries: dict[str, str]  # by product


@dataclass(frozen=True)
class LoraBase:
    """The frozen weights that the adapters of a checkpoint belong to."""

    source: str  # the file or checkpoint that they were in
    fingerprint: str  # of their content (weights/lora.py)


@dataclass(frozen=True)
class Manifest:
    """The files of a complete checkpoint. `run_id` is the same in all checkpoints of a run."""

    run_id: str
    step: int
    files: dict[str, FileRecord]
