"""Records in a checkpoint: progress, data position, manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vit_static.common.io import FileRecord
from vit_static.data.sampler import nth_batch


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Everything else that a resume needs follows from the step, the seed and the config."""

    step: Annotated[int, Field(ge=0)]  # optimizer steps done
    evaluated_step: int = 0  # the step of the last evaluation
    best_top1: float | None = None  # per cent
    best_step: int | None = None
    skipped_batches: tuple[int, ...] = ()  # indices of batches left out after a rollback (train.on_nonfinite)

    def next_batch_index(self) -> int:
        """Return the index, in the training order, of the batch that comes next."""
        return nth_batch(self.step, self.skipped_batches)


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


@dataclass(frozen=True)
class Manifest:
    """The files of a complete checkpoint. `run_id` is the same in all checkpoints of a run."""

    run_id: str
    step: int
    files: dict[str, FileRecord]
