"""Length of a whole run in steps, which needs the number of training images, and its time at a plan's speed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from vit_static.common.errors import DataError
from vit_static.common.text import duration
from vit_static.config.schema import Config
from vit_static.data.digits import NUM_TRAIN
from vit_static.data.open_set import open_set, split_path
from vit_static.optim.schedule import total_steps

# Training images of the data sets that are known by their number of classes, where their images aren't on this machine
_KNOWN_SETS = {1000: ("ImageNet-1k", 1_281_167), 21841: ("ImageNet-21k", 14_197_087)}


@dataclass(frozen=True)
class RunLength:
    """Number of training images and of optimizer steps; None if it isn't known. `source`: where the images are."""

    num_images: int | None
    source: str
    num_steps: int | None

    def as_json(self, step_seconds: float, num_gpus: int) -> dict[str, Any]:
        """Return the run's length and time as JSON values."""
        seconds = None if self.num_steps is None else self.num_steps * step_seconds
        return {
            "train_images": self.num_images,
            "steps": self.num_steps,
            "hours_at_least": None if seconds is None else seconds / 3600,
            "gpu_hours_at_least": None if seconds is None else seconds / 3600 * num_gpus,
        }

    def describe(self, config: Config, step_seconds: float, num_gpus: int) -> str:
        """Return the time of the run in words."""
        if self.num_steps is None:
            return "depends on the number of training images: set it with --num-images N"
        seconds = self.num_steps * step_seconds
        images = ""
        if self.num_images is not None:
            epochs = self.num_steps * config.data.global_batch_size / self.num_images
            images = f", {epochs:.3g} epoch{'s' * (epochs != 1)} of {self.num_images:,} images ({self.source})"
        return (
            f"at least {duration(seconds)} and {gpu_hours(seconds, num_gpus)} GPU-hours for {self.num_steps:,} steps"
            f"{images}; evaluations not included"
        )


def gpu_hours(seconds: float, num_gpus: int) -> str:
    """Return the product of time and GPUs, rounded."""
    hours = seconds / 3600 * num_gpus
    return "<0.01" if hours < 0.01 else f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"


def run_length(config: Config, num_images: int | None = None) -> RunLength:
    """Return the length of a run on this number of training images; by default it is that of the config's data set.

    Of a data set that isn't on this machine, or isn't the model's, the length is known if it is ImageNet, by its number
    of classes, or one that data.prepare makes.
    """
    num_images, source = _training_images(config) if num_images is None else (num_images, "--num-images")
    if num_images is None:
        return RunLength(None, "", config.train.max_steps)
    return RunLength(num_images, source, total_steps(config.train, num_images, config.data.global_batch_size))


def _training_images(config: Config) -> tuple[int | None, str]:
    path = split_path(config.data, "train")
    if path.exists():
        with contextlib.suppress(DataError):  # a plan needs no images, so those may be another model's
            return len(open_set(config.data, "train", config.model.num_classes)), str(path)
    elif config.data.prepare is not None:
        return NUM_TRAIN, "data.prepare"
    name, num_images = _KNOWN_SETS.get(config.model.num_classes, ("", None))
    return num_images, name
