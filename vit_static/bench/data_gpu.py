"""`bench data --device gpu`: pixels and speed of the data pipelines on a GPU, compared with the CPU.

It needs DALI but not Paddle, so it runs on every GPU that DALI supports.
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
from vit_static.common.terminal import print_table
from vit_static.common.text import print_text
from vit_static.config.data_schema import AugmentConfig, DataConfig
from vit_static.config.schema import Config
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_pipeline import eval_pipeline, train_pipeline
from vit_static.data.image_pixels import decode_options
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import open_set
from vit_static.data.sampler import ShuffledSampler

# Mean difference of an image's pixels, in grey levels of 0-255: the JPEG decoder and the arithmetic of a GPU round
# differently.
MAX_MEAN_DIFFERENCE = 1.5
NUM_IMAGES = 64
POLICIES = {
    "crop and flip": AugmentConfig(),
    "randaugment": AugmentConfig(policy="randaugment", magnitude=10.0),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "three_augment": AugmentConfig(policy="three_augment", color_jitter=0.3),
    "erasing": AugmentConfig(random_erasing_probability=1.0),
}


def run(config: Config, seconds: float, json_path: Path | None) -> None:
    """Print differences and speeds for each augmentation policy and for evaluation.

    Raise UserError if DALI can't use a GPU, RuntimeError if pixels differ by more than MAX_MEAN_DIFFERENCE.
    """
    check_writable(json_path)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        print_text(write_photos(Path(folder)), flush=True)
        data = DataConfig(root=folder, global_batch_size=NUM_IMAGES, num_threads=len(os.sched_getaffinity(0)))
        images = open_set(data, "train", NUM_PHOTO_CLASSES)
        for name, augment in [*POLICIES.items(), ("evaluation", None)]:
            results[name] = compare(config, images, data, augment, seconds)
            print_text(f"{name}  {results[name]['gpu_images_per_s']:.1f} images/s", flush=True)
    print_text("")
    headers = ("pipeline", "mean difference", "max", "GPU, images/s", "one core", "ratio")
    print_table(headers, [_row(name, values) for name, values in results.items()], right=range(1, 6))
    write_results(json_path, {}, {}, results)
    worst = max(results, key=lambda name: results[name]["mean_difference"])
    if results[worst]["mean_difference"] > MAX_MEAN_DIFFERENCE:
        raise RuntimeError(
            f"{worst}: the pixels of the GPU and the CPU differ by more than {MAX_MEAN_DIFFERENCE} grey levels"
        )
    print_text(f"all mean differences are within {MAX_MEAN_DIFFERENCE} of 255 grey levels")


def compare(
    config: Config, images: ImageDataset, data: DataConfig, augment: AugmentConfig | None, seconds: float
) -> dict[str, float]:
    """Run a pipeline (the evaluation's if `augment` is None) on the GPU and the CPU.

    Return the differences in grey levels and the speeds in images per second: of the GPU and of one CPU core.
    """
    try:
        gpu = _pipeline(config, images, data, augment, 0)
        gpu_pixels = _pixels(gpu.run())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"bench data --device gpu: not run, because DALI can't use a GPU here: {reason}") from None
    cpu = _pipeline(config, images, data, augment, None)
    levels = 255.0 * np.abs(gpu_pixels - _pixels(cpu.run())) * np.asarray(data.std, np.float32).reshape(1, -1, 1, 1)
    gpu_speed = _images_per_s(gpu, seconds)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])
    try:
        one_thread = data.model_copy(update={"num_threads": 1})
        cpu_speed = _images_per_s(_pipeline(config, images, one_thread, augment, None), seconds)
    finally:
        os.sched_setaffinity(0, cores)
    return {
        "mean_difference": float(levels.mean(axis=(1, 2, 3)).max()),
        "max_difference": float(levels.max()),
        "gpu_images_per_s": gpu_speed,
        "one_core_images_per_s": cpu_speed,
        "ratio": gpu_speed / cpu_speed,
    }


def _pipeline(
    config: Config, images: ImageDataset, data: DataConfig, augment: AugmentConfig | None, device_id: int | None
) -> Any:
    """Build the pipeline of a run (device_id None: on the CPU); each of its runs has the same images and parameters."""
    batch_size, image_size = data.global_batch_size, config.model.image_size
    encoded = [images.read_for_dali(number, decode_options(data))[0] for number in range(batch_size)]
    labels = np.zeros(batch_size, np.int64)
    if augment is None:
        inputs: Sequence[np.ndarray] = [np.ones(batch_size, np.float32)]
        return eval_pipeline(lambda n: (encoded, labels, *inputs), batch_size, image_size, data, config.eval, device_id)
    sampler, num_draws = ShuffledSampler(len(images), config.seed), num_draws_per_image(augment)
    inputs = [sampler.crop_flip_draws(0, batch_size)]
    if num_draws:
        draws = sampler.augmentation_draws(0, batch_size, num_draws)
        inputs += op_parameters(draws, augment, image_size).values()
    return train_pipeline(lambda n: (encoded, labels, *inputs), batch_size, image_size, data, augment, device_id)


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


def _row(name: str, values: dict[str, float]) -> tuple[str, ...]:
    keys = ("max_difference", "gpu_images_per_s", "one_core_images_per_s", "ratio")
    return name, f"{values['mean_difference']:.3f}", *(f"{values[key]:.1f}" for key in keys)
