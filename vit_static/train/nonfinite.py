"""Detection of and reports on steps with non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vit_static.checkpoint.progress import Progress
from vit_static.common.errors import describe_error
from vit_static.common.io import write_json
from vit_static.data.sampler import make_sampler
from vit_static.train.run_dir import RunDir
from vit_static.train.run_spec import RunSpec


@dataclass(frozen=True)
class NonFiniteReport:
    """Facts about a step with non-finite gradients."""

    step: int  # counted from 1
    lr: float
    grad_norms: dict[str, float]  # by block
    batch: int  # its number in the order of the training images
    batch_size: int

    def path(self, folder: Path) -> Path:
        return folder / f"nonfinite_step_{self.step:08d}.json"

    def write(self, folder: Path, spec: RunSpec) -> None:
        """Write the report, with the names of the batch's images."""
        images = spec.train_images
        config = spec.config
        sampler = make_sampler(images, config.data, config.seed, config.augment.repeated_aug)
        numbers = sampler.indices(self.batch * self.batch_size, (self.batch + 1) * self.batch_size)
        # JSON has no NaN and no infinity.
        norms = {block: norm if math.isfinite(norm) else str(norm) for block, norm in self.grad_norms.items()}
        names = [images.name(int(number)) for number in numbers]
        write_json({**asdict(self), "grad_norms": norms, "images": names}, self.path(folder))


@dataclass(frozen=True)
class NonFiniteStep:
    """The first step whose gradients weren't finite, the number of its batch, and a message about it."""

    step: int
    batch: int
    message: str


class NonFiniteGuard:
    """Checks the gradients of the steps since the last check; rank 0 writes a report on a bad one."""

    def __init__(self, spec: RunSpec, run: RunDir, agree: Callable[[Any], Any]) -> None:
        """`agree` returns the first value that isn't None among those that the ranks pass, the same on all ranks."""
        self._spec, self._run, self._agree = spec, run, agree

    def check(
        self, first_nonfinite: tuple[int, dict[str, float]] | None, progress: Progress, loss: float | None
    ) -> NonFiniteStep | None:
        """Return the first bad step, the same on all ranks, which all call this together.

        `first_nonfinite` is Program.first_nonfinite_step's value; `loss` the last step's, where it has just been read.
        """
        if first_nonfinite is None and loss is not None and not math.isfinite(loss):
            first_nonfinite = progress.step, {}
        agreed = self._agree(first_nonfinite)
        if agreed is None:
            return None
        step, norms = agreed
        batch = replace(progress, step=step - 1).next_batch_index()
        report = NonFiniteReport(step, self._spec.lr_at(step - 1), norms, batch, self._spec.batch_size)
        path, problem = report.path(self._run.path), None
        if self._run.is_writer:
            try:
                report.write(self._run.path, self._spec)
            except OSError as error:
                problem = f"no report could be written: {describe_error(error)}"
        note = self._agree(problem) or f"{path} lists their norms by block and the names of the images"
        return NonFiniteStep(step, batch, f"the gradients of step {step} are not finite ({note})")

    def may_roll_back(self, progress: Progress) -> bool:
        """Return whether the config allows going back to the last checkpoint once more."""
        train = self._spec.config.train
        return train.on_nonfinite == "rollback" and len(progress.skipped_batches) < train.max_rollbacks
