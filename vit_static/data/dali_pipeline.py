"""DALI's pipelines: the operations in the order in which they are executed, for CPU and GPU from the same lines.

They get from Python the encoded images that come next, and the random numbers for their augmentation, and hold no
random state and no position of their own: DALI's threads decode and transform.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import nvidia.dali.math as dali_math
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from vit_static.config.schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_ops import augmented, erased
from vit_static.data.sampler import NUM_CROP_FLIP_DRAWS

NUM_CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
MAX_RESIZE_TO_CROP_RATIO = 16  # what an image is resized to, along its longer side
_INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

# For the n-th batch: a list of the encoded images, [num_bytes] uint8 each; labels [B] int64 or [B, num_classes] uint8;
# and as many more arrays of a row an image as the pipeline wants.
BatchSource = Callable[[int], tuple[Any, ...]]


def train_pipeline(
    source: BatchSource,
    batch_size: int,
    image_size: tuple[int, int],
    data: DataConfig,
    augment: AugmentConfig,
    device_id: int | None,
    last_stage: Literal["decode", "resize", "augment", "normalise"] = "normalise",
) -> Pipeline:
    """Images [B, 3, height, width] float32 and their labels; of an earlier `last_stage`, images as it leaves them.

    `source` gives with the images and labels uniform draws [B, NUM_CROP_FLIP_DRAWS], and then augment.parameters's arrays.
    `device_id` None is a pipeline on the CPU; a number decodes and transforms on that card.
    """
    num_draws = num_draws_per_image(augment)
    examples = op_parameters(np.zeros((1, num_draws), np.float32), augment, image_size) if num_draws else {}

    @pipeline_def(enable_conditionals=num_draws > 0)
    def pipeline() -> tuple[Any, Any]:
        crop_draws = np.zeros((1, NUM_CROP_FLIP_DRAWS), np.float32)
        encoded, labels, draws, *values = _inputs(source, data, crop_draws, *examples.values())
        parameters = dict(zip(examples, values))  # noqa: B905 - DALI puts its own zip in place, without `strict`
        start, shape = random_crop(fn.peek_image_shape(encoded, adjust_orientation=False), draws, augment)
        decoded = fn.decoders.image_slice(
            encoded,
            start,
            shape,
            axes=[0, 1],
            normalized_anchor=False,
            normalized_shape=False,
            adjust_orientation=False,
            device="cpu" if device_id is None else "mixed",
        )
        resized = fn.resize(
            decoded,
            size=list(image_size),
            interp_type=_INTERPOLATIONS[augment.interpolation],
            antialias=augment.antialias,
        )
        changed = augmented(resized, parameters, augment)
        flip = fn.cast(draws[22] < augment.flip_probability, dtype=types.INT32)
        normalised = erased(_normalised(changed, data, mirror=flip), parameters, augment, image_size)
        # DALI leaves out what comes after the stage that is asked for.
        stages = {"decode": decoded, "resize": resized, "augment": changed, "normalise": normalised}
        return stages[last_stage], labels

    return _build(pipeline, batch_size, data.num_threads, data.prefetch_batches, device_id)


def random_crop(shape: Any, draws: Any, augment: AugmentConfig) -> tuple[Any, Any]:
    """A crop's corner and size, [2] each (y, x), in an image of `shape` [3]: torchvision's RandomResizedCrop.

    Ten tries at a share of the area (uniform) and an aspect ratio (uniform in its logarithm); the first that fits
    in the image is placed uniformly. If none fits, the largest centred crop within the aspect ratios.
    `draws` [24]: 0-9 areas, 10-19 aspects, 20 and 21 the place.
    """
    height, width = fn.cast(shape[0], dtype=types.FLOAT), fn.cast(shape[1], dtype=types.FLOAT)
    least_area, most_area = augment.crop_scale
    least_aspect, most_aspect = augment.crop_aspect_ratio
    area = height * width * (least_area + (most_area - least_area) * draws[0:10])
    log_least, log_most = math.log(least_aspect), math.log(most_aspect)
    aspect = dali_math.exp(log_least + (log_most - log_least) * draws[10:20])
    tried_width = dali_math.floor(dali_math.sqrt(area * aspect) + 0.5)
    tried_height = dali_math.floor(dali_math.sqrt(area / aspect) + 0.5)
    fits = (tried_width >= 1) & (tried_width <= width) & (tried_height >= 1) & (tried_height <= height)
    # The first that fits has the highest rank; where none fits, all ranks are 0 and nothing is chosen.
    ranks = fn.cast(fits, dtype=types.FLOAT) * np.arange(NUM_CROP_ATTEMPTS, 0, -1, dtype=np.float32)
    best = fn.reductions.max(ranks)
    chosen = fn.cast((ranks == best) & fits, dtype=types.FLOAT)
    none_fits = fn.cast(best == 0, dtype=types.FLOAT)
    crop_width = fn.reductions.sum(tried_width * chosen)
    crop_height = fn.reductions.sum(tried_height * chosen)
    crop_width += none_fits * dali_math.min(width, dali_math.floor(height * most_aspect + 0.5))
    crop_height += none_fits * dali_math.min(height, dali_math.floor(width / least_aspect + 0.5))
    y_share = none_fits * 0.5 + (1 - none_fits) * draws[20]
    x_share = none_fits * 0.5 + (1 - none_fits) * draws[21]
    num_places_y, num_places_x = height - crop_height + 1 - none_fits, width - crop_width + 1 - none_fits
    y = dali_math.min(dali_math.floor(num_places_y * y_share), height - crop_height)
    x = dali_math.min(dali_math.floor(num_places_x * x_share), width - crop_width)
    return fn.stack(y, x), fn.stack(crop_height, crop_width)


def eval_pipeline(
    source: BatchSource,
    batch_size: int,
    image_size: tuple[int, int],
    data: DataConfig,
    evaluation: EvalConfig,
    device_id: int | None,
) -> Pipeline:
    """Images [B, 3, height, width] float32, labels and `source`'s weights [B] (0 for what fills a batch up)."""

    @pipeline_def
    def pipeline() -> tuple[Any, Any, Any]:
        encoded, labels, weights = _inputs(source, data, np.zeros(1, np.float32))
        images = fn.decoders.image(encoded, adjust_orientation=False, device="cpu" if device_id is None else "mixed")
        return preprocessed(images, image_size, data, evaluation), labels, weights

    return _build(pipeline, batch_size, data.num_threads, data.prefetch_batches, device_id)


def preprocessing_pipeline(
    batch_size: int, num_threads: int, image_size: tuple[int, int], data: DataConfig, evaluation: EvalConfig
) -> Pipeline:
    """The evaluation's preprocessing of images that are decoded already, on the CPU: ``run(pixels=[...])``.

    Takes up to `batch_size` arrays [height, width, 3] uint8, gives images [B, 3, height, width] float32.
    """

    @pipeline_def
    def pipeline() -> Any:
        pixels = fn.external_source(name="pixels", batch=True, dtype=types.UINT8, ndim=3, layout="HWC")
        return preprocessed(pixels, image_size, data, evaluation)

    return _build(pipeline, batch_size, num_threads, 1, None)


def decoding_pipeline(batch_size: int, num_threads: int, device_id: int | None) -> Pipeline:
    """Decodes as training does: ``run(encoded=[...])``, up to `batch_size` arrays [num_bytes] uint8.

    Dead after an image that can't be decoded.
    """

    @pipeline_def
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, adjust_orientation=False, device="cpu" if device_id is None else "mixed")

    return _build(pipeline, batch_size, num_threads, 1, device_id)


def decoders_words(error: RuntimeError) -> str:
    """What DALI says of an image that it can't decode, without where in its sources it says so."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    behind = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else lines
    said = [line for line in behind if "[/" in line or "failed" in line.lower() or "failure" in line.lower()]
    reason = re.sub(r"^\[/[^]]*\] (\[[^]]*\] )?", "", (said or behind or [""])[0])
    return reason[:200] if reason and not reason.startswith("Failed to decode sample") else "no reason given"


def preprocessed(images: Any, image_size: tuple[int, int], data: DataConfig, evaluation: EvalConfig) -> Any:
    """What is done to a decoded image before the model sees it: resized, its centre cut out, normalised."""
    resize = {"interp_type": _INTERPOLATIONS[evaluation.interpolation], "antialias": evaluation.antialias}
    if evaluation.resize == "direct":
        return _normalised(fn.resize(images, size=list(image_size), **resize), data)
    # Not DALI's mode="not_smaller": the seed rounds the long side, and the centre's corner down.
    shape = images.shape(dtype=types.FLOAT)
    least_height, least_width = size_before_crop(image_size, evaluation)
    scale = dali_math.max(least_height / shape[0], least_width / shape[1])
    # Of an image of 20,000 pixels by 1 only the middle, which is all that is cut out: else it would be resized to
    # millions by 256.
    most = types.Constant([MAX_RESIZE_TO_CROP_RATIO * float(side) for side in (least_height, least_width)])
    kept = dali_math.min(shape[0:2], dali_math.ceil(most / scale))
    images = fn.slice(
        images,
        dali_math.floor((shape[0:2] - kept) / 2.0),
        kept,
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
    )
    images = fn.resize(images, size=dali_math.floor(kept * scale + 0.5), **resize)
    return _normalised(images, data, crop=list(image_size), rounding="truncate")


def size_before_crop(image_size: tuple[int, int], evaluation: EvalConfig) -> tuple[int, int]:
    """The least size, height and width, to which an image is resized before its centre is cut out."""
    return (round(image_size[0] / evaluation.crop_pct), round(image_size[1] / evaluation.crop_pct))


def _inputs(source: BatchSource, data: DataConfig, *examples: np.ndarray) -> list[Any]:
    """What `source` gives: encoded images, labels, and arrays of the kinds of the `examples`, of a row an image."""
    labels = np.zeros((1, 1), np.uint8) if data.multi_label else np.zeros(1, np.int64)
    kinds = [np.zeros((1, 1), np.uint8), labels, *examples]
    return list(
        fn.external_source(
            source=source,
            num_outputs=len(kinds),
            batch=True,
            dtype=[types.to_dali_type(kind.dtype) for kind in kinds],
            ndim=[kind.ndim - 1 for kind in kinds],
        )
    )


def _normalised(images: Any, data: DataConfig, **crop_or_mirror: Any) -> Any:
    """Pixels 0-255 to (pixel / 255 - mean) / std, [3, height, width] each, centre-cropped or mirrored on the way."""
    return fn.crop_mirror_normalize(
        images,
        mean=[255.0 * value for value in data.mean],
        std=[255.0 * value for value in data.std],
        dtype=types.FLOAT,
        output_layout="CHW",
        **crop_or_mirror,
    )


def _build(pipeline: Any, batch_size: int, num_threads: int, prefetch: int, device_id: int | None) -> Pipeline:
    built = pipeline(batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=prefetch)
    built.build()
    return built
