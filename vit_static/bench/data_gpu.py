"""`bench data --device gpu`: the pipelines on a card against the same on the CPU: their pixels, and their speed.

It takes DALI alone, no Paddle, and so runs on any card that DALI supports.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.bench.harness import check_writable, write_results
from vit_static.bench.photos import NUM_PHOTO_CLASSES, write_photos
from vit_static.common.errors import UserError
from vit_static.config.schema import AugmentConfig, Config, DataConfig
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_pipeline import eval_pipeline, train_pipeline
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import open_set
from vit_static.data.sampler import ShuffledSampler

# Of a batch's pixels, in grey levels: a card's JPEG decoder and its arithmetic round otherwise.
LARGEST_MEAN_DIFFERENCE = 1.5
NUM_COMPARED = 64
POLICIES = {
    "crop and flip": AugmentConfig(),
    "randaugment": AugmentConfig(policy="randaugment", magnitude=10.0),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "three_augment": AugmentConfig(policy="three_augment", color_jitter=0.3),
    "erasing": AugmentConfig(random_erasing_probability=1.0),
}


def run(config: Config, seconds: float, json_path: Path | None) -> None:
    """Prints differences and speeds. Raises UserError without a card, RuntimeError where pixels differ by more than the
    bound."""
    check_writable(json_path)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        print(write_photos(Path(folder)), flush=True)
        data = DataConfig(root=folder, global_batch_size=NUM_COMPARED, num_threads=len(os.sched_getaffinity(0)))
        images = open_set(data, "train", NUM_PHOTO_CLASSES)
        print(f"{'':<22}{'mean difference':>17}{'largest':>9}{'card, images/s':>17}{'one core':>10}{'ratio':>8}")
        for name, augment in POLICIES.items():
            found[name] = compare(config, images, data, augment, seconds)
            _print_row(name, found[name])
        found["evaluation"] = compare(config, images, data, None, seconds)
        _print_row("evaluation", found["evaluation"])
    write_results(json_path, {}, {}, found)
    worst = max(found, key=lambda name: found[name]["mean_difference"])
    if found[worst]["mean_difference"] > LARGEST_MEAN_DIFFERENCE:
        raise RuntimeError(f"{worst}: the card's pixels differ by more than {LARGEST_MEAN_DIFFERENCE} grey levels")
    print(f"all within a mean of {LARGEST_MEAN_DIFFERENCE} of 255 grey levels")


def compare(
    config: Config, images: ImageDataset, data: DataConfig, augment: AugmentConfig | None, seconds: float
) -> dict[str, float]:
    """One pipeline (`augment` None: the evaluation's) on both: differences in grey levels, images a second."""
    try:
        card = _pipeline(config, images, data, augment, 0)
        on_card = _pixels(card.run())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"bench data --device gpu: DALI finds no card that it can use ({reason}): not run") from None
    cpu = _pipeline(config, images, data, augment, None)
    levels = 255.0 * np.abs(on_card - _pixels(cpu.run())) * np.asarray(data.std, np.float32).reshape(1, 3, 1, 1)
    card_speed = _images_per_s(card, seconds)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])
    try:
        alone = data.model_copy(update={"num_threads": 1})
        cpu_speed = _images_per_s(_pipeline(config, images, alone, augment, None), seconds)
    finally:
        os.sched_setaffinity(0, cores)
    return {
        "mean_difference": float(levels.mean(axis=(1, 2, 3)).max()),
        "largest_difference": float(levels.max()),
        "card_images_per_s": card_speed,
        "one_core_images_per_s": cpu_speed,
        "ratio": card_speed / cpu_speed,
    }


def _pipeline(
    config: Config, images: ImageDataset, data: DataConfig, augment: AugmentConfig | None, device_id: int | None
) -> Any:
    """The run's own pipeline, of the same images, draws and parameters at every call."""
    batch_size, image_size = data.global_batch_size, config.model.image_size
    encoded = [images.read(number)[0] for number in range(batch_size)]
    labels = np.zeros(batch_size, np.int64)
    if augment is None:
        rows: Sequence[np.ndarray] = [np.ones(batch_size, np.float32)]
        return eval_pipeline(lambda n: (encoded, labels, *rows), batch_size, image_size, data, config.eval, device_id)
    order, num_draws = ShuffledSampler(len(images), config.seed), num_draws_per_image(augment)
    rows = [order.crop_flip_draws(0, batch_size)]
    if num_draws:
        draws = order.augmentation_draws(0, batch_size, num_draws)
        rows += op_parameters(draws, augment, image_size).values()
    return train_pipeline(lambda n: (encoded, labels, *rows), batch_size, image_size, data, augment, device_id)


def _pixels(outputs: Any) -> np.ndarray:
    images = outputs[0]
    return np.asarray((images.as_cpu() if hasattr(images, "as_cpu") else images).as_tensor())


def _images_per_s(pipeline: Any, seconds: float) -> float:
    for _ in range(8):
        _pixels(pipeline.run())
    started, num_images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        num_images += len(pipeline.run()[0])
    return num_images / elapsed


def _print_row(name: str, row: dict[str, float]) -> None:
    print(
        f"{name:<22}{row['mean_difference']:17.3f}{row['largest_difference']:9.1f}{row['card_images_per_s']:17.1f}"
        f"{row['one_core_images_per_s']:10.1f}{row['ratio']:8.1f}",
        flush=True,
    )
