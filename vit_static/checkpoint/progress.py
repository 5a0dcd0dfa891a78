"""Records in a checkpoint: progress, data position, manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vit_static.data.sampler import nth_batch


@dataclass(frozen=True)
class Progress:
    """Where a run stands; all else that it needs to go on follows from the step, the seed and the config."""

    step: Annotated[int, Field(ge=0)]  # optimizer steps done
    evaluated_step: int = 0  # after how many of them the last evaluation was
    best_top1: float | None = None
    best_step: int | None = None
    skipped_batches: tuple[int, ...] = ()  # batches of the order that the run has passed over (train.on_nonfinite)

    def batch(self) -> int:
        """The number, in the order of the images, of the batch that comes next."""
        return nth_batch(self.step, self.skipped_batches)


@dataclass(frozen=True)
class DataPosition:
    """Where a run stands in its images: the next one's position in the line of data/order.py, and what the line is of.

    That is all: which images come, in which order, and how each is augmented, are functions of these numbers.
    """

    position: int
    num_images: int
    images: str  # ImageSet.digest
    seed: int
    repeated_aug: int


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of. `run` is the same for all of a run's."""

    run: str
    step: int
    files: dict[str, FileRecord]
