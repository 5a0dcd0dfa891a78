"""DALI pipelines for training, evaluation and prediction, with the same code for CPU and GPU.

A pipeline lists its operations in execution order. Python supplies the next encoded images and the random numbers for
their augmentation; DALI's threads decode and transform. A pipeline has no random state and no position of its own.
The encoded images are those of `image_pixels.prepare_for_dali`, which has decided what orientation DALI finds in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import nvidia.dali.math as dali_math
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline, do_not_convert

from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_ops import apply_ops, random_erasing, to_device_of
from vit_static.data.sampler import NUM_CROP_FLIP_DRAWS

NUM_CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
MAX_RESIZE_TO_CROP_RATIO = 16  # limits the longer side of an image that is resized before its centre is cropped
_INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

# Returns the n-th batch: a list of encoded images, each [num_bytes] uint8; labels [B] int64 or [B, num_classes] uint8;
# and the further arrays [B, ...] that the pipeline needs.
BatchSource = Callable[[int], tuple[Any, ...]]


def train_pipeline(
    source: BatchSource,
    batch_size: int,
    image_size: tuple[int, int],
    data: DataConfig,
    augment: AugmentConfig,
    device_id: int | None,
    last_stage: Literal["decode", "resize", "augment", "normalise"] = "normalise",
    size_varies: bool = False,
) -> Pipeline:
    """Build the training pipeline: images [B, 3, height, width] float32, or [B, 1, ...] if grey, and labels.

    `source` returns, after images and labels, uniform random numbers [B, NUM_CROP_FLIP_DRAWS], then the arrays of
    `op_parameters`, and with `size_varies` the sizes of the images [B, 2] int32, one size per batch and at most
    `image_size`. With `device_id` None everything runs on the CPU, else decoding and transforms run on that GPU.
    An earlier `last_stage` returns the images as that stage leaves them.
    """
    num_draws = num_draws_per_image(augment)
    examples = op_parameters(np.zeros((1, num_draws), np.float32), augment, image_size) if num_draws else {}
    if size_varies:
        examples["image_size"] = np.zeros((1, 2), np.int32)

    @pipeline_def(enable_conditionals=num_draws > 0)
    def pipeline() -> tuple[Any, Any]:
        example_draws = np.zeros((1, NUM_CROP_FLIP_DRAWS), np.float32)
        encoded, labels, draws, *values = _inputs(source, data, example_draws, *examples.values())
        parameters = dict(zip(examples, values))  # noqa: B905 - DALI replaces zip by its own, without `strict`
        start, shape = random_crop(fn.peek_image_shape(encoded, adjust_orientation=True), draws, augment)
        decoded = fn.decoders.image_slice(
            encoded,
            start,
            shape,
            axes=[0, 1],
            normalized_anchor=False,
            normalized_shape=False,
            adjust_orientation=True,
            **_decoder_options(data, device_id),
        )
        resized = fn.resize(
            decoded,
            size=fn.cast(parameters["image_size"], dtype=types.FLOAT) if size_varies else list(image_size),
            interp_type=_INTERPOLATIONS[augment.interpolation],
            antialias=augment.antialias,
        )
        augmented = apply_ops(resized, parameters, augment)
        is_flipped = fn.cast(draws[22] < augment.flip_probability, dtype=types.INT32)
        normalised = _normalise(augmented, data, mirror=is_flipped)
        normalised = random_erasing(normalised, parameters, augment, image_size, data.num_channels)
        # DALI removes operations whose outputs aren't returned, so the stages after `last_stage` don't run.
        stages = {"decode": decoded, "resize": resized, "augment": augmented, "normalise": normalised}
        return stages[last_stage], to_device_of(decoded, labels)

    return _build(pipeline, batch_size, data.num_threads, data.prefetch_batches, device_id)


@do_not_convert
def random_crop(shape: Any, draws: Any, augment: AugmentConfig) -> tuple[Any, Any]:
    """Return a crop's corner and size, [2] each (y, x), in an image of `shape` [3], by `augment.crop_method`.

    `draws` [24]: 0-9 areas, 10-19 aspect ratios, 20 and 21 the position.
    """
    height, width = fn.cast(shape[0], dtype=types.FLOAT), fn.cast(shape[1], dtype=types.FLOAT)
    return _CROP_METHODS[augment.crop_method](height, width, draws, augment)


def _torchvision_crop(height: Any, width: Any, draws: Any, augment: AugmentConfig) -> tuple[Any, Any]:
    """Return the crop of torchvision's RandomResizedCrop.

    In up to ten attempts, the share of the area is uniform and the aspect ratio is uniform in its logarithm; the first
    crop that fits in the image gets a uniform position. If none fits, the crop is the largest centred one with an
    allowed aspect ratio.
    """
    min_area, max_area = augment.crop_scale
    min_aspect_ratio, max_aspect_ratio = augment.crop_aspect_ratio
    area = height * width * (min_area + (max_area - min_area) * draws[0:10])
    log_min, log_max = math.log(min_aspect_ratio), math.log(max_aspect_ratio)
    aspect_ratio = dali_math.exp(log_min + (log_max - log_min) * draws[10:20])
    widths = dali_math.floor(dali_math.sqrt(area * aspect_ratio) + 0.5)  # [10]
    heights = dali_math.floor(dali_math.sqrt(area / aspect_ratio) + 0.5)  # [10]
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    # The first attempt that fits has the highest score; if none fits, all scores are 0 and none is selected.
    scores = fn.cast(fits, dtype=types.FLOAT) * np.arange(NUM_CROP_ATTEMPTS, 0, -1, dtype=np.float32)
    best = fn.reductions.max(scores)
    is_selected = fn.cast((scores == best) & fits, dtype=types.FLOAT)
    none_fits = fn.cast(best == 0, dtype=types.FLOAT)
    crop_width = fn.reductions.sum(widths * is_selected)
    crop_height = fn.reductions.sum(heights * is_selected)
    crop_width += none_fits * dali_math.min(width, dali_math.floor(height * max_aspect_ratio + 0.5))
    crop_height += none_fits * dali_math.min(height, dali_math.floor(width / min_aspect_ratio + 0.5))
    y_share = none_fits * 0.5 + (1 - none_fits) * draws[20]
    x_share = none_fits * 0.5 + (1 - none_fits) * draws[21]
    num_y, num_x = height - crop_height + 1 - none_fits, width - crop_width + 1 - none_fits
    y = dali_math.min(dali_math.floor(num_y * y_share), height - crop_height)
    x = dali_math.min(dali_math.floor(num_x * x_share), width - crop_width)
    return fn.stack(y, x), fn.stack(crop_height, crop_width)


def _plsc_crop(height: Any, width: Any, draws: Any, augment: AugmentConfig) -> tuple[Any, Any]:
    """Return the crop of PLSC's RandCropImage (plsc/data/preprocess/basic_transforms.py).

    The aspect ratio is uniform, the share of the area is uniform between the limits, each reduced to what fits in the
    image with this ratio, and the position is uniform.
    """
    min_area, max_area = augment.crop_scale
    min_aspect_ratio, max_aspect_ratio = augment.crop_aspect_ratio
    aspect_ratio = min_aspect_ratio + (max_aspect_ratio - min_aspect_ratio) * draws[10]
    bound = dali_math.min(width / height / aspect_ratio, height / width * aspect_ratio)
    low, high = dali_math.min(bound, min_area), dali_math.min(bound, max_area)
    area = height * width * (low + (high - low) * draws[0])

    def side(squared: Any, largest: Any) -> Any:
        """Return whole pixels, rounded down but for float32's error, so that a crop of the image's width has that."""
        return dali_math.clamp(dali_math.floor(dali_math.sqrt(squared) * (1 + 1e-6)), 1, largest)

    crop_height, crop_width = side(area / aspect_ratio, height), side(area * aspect_ratio, width)
    y = dali_math.min(dali_math.floor((height - crop_height + 1) * draws[20]), height - crop_height)
    x = dali_math.min(dali_math.floor((width - crop_width + 1) * draws[21]), width - crop_width)
    return fn.stack(y, x), fn.stack(crop_height, crop_width)


_CROP_METHODS = {"torchvision": _torchvision_crop, "plsc": _plsc_crop}


def eval_pipeline(
    source: BatchSource,
    batch_size: int,
    image_size: tuple[int, int],
    data: DataConfig,
    evaluation: EvalConfig,
    device_id: int | None,
) -> Pipeline:
    """Build the evaluation pipeline: images [B, 3, height, width] float32, labels, weights [B].

    `source` returns the weights after images and labels; they are 0 for the images that pad the last batch, and stay on
    the CPU.
    """

    @pipeline_def
    def pipeline() -> tuple[Any, Any, Any]:
        encoded, labels, weights = _inputs(source, data, np.zeros(1, np.float32))
        decodable = after_header_check(encoded)
        images = fn.decoders.image(decodable, adjust_orientation=True, **_decoder_options(data, device_id))
        return preprocess(images, image_size, data, evaluation), to_device_of(images, labels), weights

    return _build(pipeline, batch_size, data.num_threads, data.prefetch_batches, device_id)


def preprocessing_pipeline(
    batch_size: int, num_threads: int, image_size: tuple[int, int], data: DataConfig, evaluation: EvalConfig
) -> Pipeline:
    """Build the evaluation's preprocessing, on the CPU, for images that are already decoded.

    ``run(pixels=[...])`` takes up to `batch_size` arrays [height, width, 3] uint8 and returns images [B, 3, height,
    width] float32.
    """

    @pipeline_def
    def pipeline() -> Any:
        pixels = fn.external_source(name="pixels", batch=True, dtype=types.UINT8, ndim=3, layout="HWC")
        return preprocess(pixels, image_size, data, evaluation)

    return _build(pipeline, batch_size, num_threads, 1, None)


def decoding_pipeline(batch_size: int, num_threads: int, device_id: int | None) -> Pipeline:
    """Build a pipeline that only decodes, as training does.

    ``run(encoded=[...])`` takes up to `batch_size` arrays [num_bytes] uint8. After an image that can't be decoded, the
    pipeline can't be used any more.
    """

    @pipeline_def
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        decodable = after_header_check(encoded)
        return fn.decoders.image(decodable, adjust_orientation=True, device="cpu" if device_id is None else "mixed")

    return _build(pipeline, batch_size, num_threads, 1, device_id)


def after_header_check(encoded: Any) -> Any:
    """Return the encoded images unchanged, once the header of each of them has been read.

    DALI's decoder reads the headers on several threads. If it can't read one, it returns while its other threads still
    use variables that no longer exist, and the process ends with a segmentation fault (seen with DALI 2.4). An operator
    of its own that reads the headers first raises the same error safely. The training pipeline does so for its crops.
    """
    height = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[0:1], dtype=types.INT32)
    return fn.reshape(encoded, shape=height * 0 - 1)  # to [-1], without a copy; DALI must evaluate the height first


def preprocess(images: Any, image_size: tuple[int, int], data: DataConfig, evaluation: EvalConfig) -> Any:
    """Resize decoded images, crop their centre and normalise them."""
    resize = {"interp_type": _INTERPOLATIONS[evaluation.interpolation], "antialias": evaluation.antialias}
    if evaluation.resize == "direct":
        return _normalise(fn.resize(images, size=list(image_size), **resize), data)
    # DALI's mode="not_smaller" differs from PLSC, which rounds the long side, and the corner of the centre down.
    shape = images.shape(dtype=types.FLOAT)
    min_height, min_width = size_before_crop(image_size, evaluation)
    scale = dali_math.max(min_height / shape[0], min_width / shape[1])
    # Only the middle of a very slim image is resized: the crop takes nothing else, and an image of 20,000 by 1 pixels
    # would become one of millions by 256.
    max_size = types.Constant([MAX_RESIZE_TO_CROP_RATIO * float(side) for side in (min_height, min_width)])
    middle_size = dali_math.min(shape[0:2], dali_math.ceil(max_size / scale))
    images = fn.slice(
        images,
        dali_math.floor((shape[0:2] - middle_size) / 2.0),
        middle_size,
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
    )
    images = fn.resize(images, size=dali_math.floor(middle_size * scale + 0.5), **resize)
    return _normalise(images, data, crop=list(image_size), rounding="truncate")


def size_before_crop(image_size: tuple[int, int], evaluation: EvalConfig) -> tuple[int, int]:
    """Return the least height and width to which an image is resized before its centre is cropped."""
    return (round(image_size[0] / evaluation.crop_pct), round(image_size[1] / evaluation.crop_pct))


@do_not_convert
def _inputs(source: BatchSource, data: DataConfig, *examples: np.ndarray) -> list[Any]:
    """Return the pipeline's inputs: encoded images, labels, and arrays with the types and axes of the `examples`."""
    labels = np.zeros((1, 1), np.uint8) if data.multi_label else np.zeros(1, np.int64)
    examples = (np.zeros((1, 1), np.uint8), labels, *examples)
    return list(
        fn.external_source(
            source=source,
            num_outputs=len(examples),
            batch=True,
            dtype=[types.to_dali_type(example.dtype) for example in examples],
            ndim=[example.ndim - 1 for example in examples],
        )
    )


@do_not_convert
def _decoder_options(data: DataConfig, device_id: int | None) -> dict[str, Any]:
    return {"device": "cpu"} if device_id is None else {"device": "mixed", "hw_decoder_load": data.hw_decoder_load}


@do_not_convert
def _normalise(images: Any, data: DataConfig, **crop_or_mirror: Any) -> Any:
    """Turn RGB pixels 0-255 into (pixel / 255 - mean) / std, [3, height, width], cropped or mirrored in the same pass.

    If mean and std have one value, the pixels become grey first, [1, height, width]. Everything before sees colours, so
    all augmentations work, and the same conversion serves training, evaluation and prediction.
    """
    if data.num_channels == 1:
        images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    return fn.crop_mirror_normalize(
        images,
        mean=[255.0 * value for value in data.mean],
        std=[255.0 * value for value in data.std],
        dtype=types.FLOAT,
        output_layout="CHW",
        **crop_or_mirror,
    )


def _build(pipeline: Any, batch_size: int, num_threads: int, prefetch_batches: int, device_id: int | None) -> Pipeline:
    built = pipeline(
        batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=prefetch_batches
    )
    built.build()
    return built
