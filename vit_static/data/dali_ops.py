"""Augmentation operations built from DALI's operators, with the same code for CPU and GPU and without randomness.

The operations follow Pillow's definitions, as the references of RandAugment and its relatives do. The differences from
Pillow, in grey levels of 255: the mean of the worst of six photos, and the largest of all pixels
(`./run.sh test tests/data/test_dali_ops.py -rP` prints them):

    brightness, contrast, posterize, solarize, solarize_add, cutout    0        0
    geometric, nearest neighbour                                       0        0
    colour, grey                                                       0.001    1   rounding
    autocontrast                                                       0.02     1   rounding
    sharpness                                                          0.65    34   at the border, which Pillow doesn't
                                                                                    change; inside it 0.45 and 1
    geometric, linear                                                  0.7     63   at the edge of the grey fill; inside
                                                                                    it 0.5 and 1, as Pillow truncates
    blur                                                               0.6      9   Pillow uses three box filters
    equalize                                                           1.0      3   OpenCV's; 3.9 and 7 on photos with a
                                                                                    third of the contrast
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import nvidia.dali.math as dali_math
from nvidia.dali import fn, types
from nvidia.dali.pipeline import do_not_convert

from vit_static.config.data_schema import AugmentConfig
from vit_static.data.augment import Op, ops_per_layer

GREY = 128  # fills cut-out boxes, and what a geometric operation leaves empty
_NOISE_SEED = 0
_SMOOTHING_KERNEL = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13.0  # Pillow's ImageFilter.SMOOTH
_IDENTITY_KERNEL = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
# A cast rounds to the nearest level, while Pillow's operations truncate. An integer stays the same.
_TRUNCATION_OFFSET = -0.498
# DALI rewrites the functions that a pipeline calls, so that `if` works on values of images. Where no such `if` is, the
# function is marked: rewriting takes 0.1 to 0.5 s each.
_ops_per_layer = do_not_convert(ops_per_layer)


def apply_ops(images: Any, parameters: Mapping[str, Any], config: AugmentConfig) -> Any:
    """Apply all layers to images [height, width, 3] uint8. `parameters` are those of `augment.op_parameters`.

    DALI splits the batch at each `if`, so that an image only costs the time of its own operations.
    """
    for layer, ops in enumerate(_ops_per_layer(config)):
        op, factor = parameters["op"][layer], parameters["factor"][layer]
        if Op.GEOMETRIC in ops and op == Op.GEOMETRIC:
            matrix = parameters["matrix"][layer]
            images = fn.warp_affine(images, matrix=matrix, fill_value=GREY, interp_type=_interpolation(config))
        if (op >= Op.BRIGHTNESS) & (op <= Op.SHARPNESS):
            images = blend(images, op, factor)
        if (op >= Op.POSTERIZE) & (op <= Op.SOLARIZE_ADD):
            images = map_values(images, op, factor)
        if ops & {Op.AUTOCONTRAST, Op.EQUALIZE}:
            if op == Op.AUTOCONTRAST:
                images = autocontrast(images)
            elif op == Op.EQUALIZE:
                images = fn.equalize(images)
        if Op.CUTOUT in ops and op == Op.CUTOUT:
            images = cutout(images, parameters["box"][layer])
        if Op.BLUR in ops and op == Op.BLUR:
            images = fn.gaussian_blur(images, sigma=factor)
    return images


def blend(images: Any, op: Any, factor: Any) -> Any:
    """Apply brightness, contrast, colour or sharpness, as Pillow's ImageEnhance does.

    The result is d + factor * (image - d), where d is black, the mean grey, the grey image or the smoothed image.
    """
    if op == Op.BRIGHTNESS:
        result = fn.brightness_contrast(images, brightness=factor, brightness_shift=_TRUNCATION_OFFSET / 255)
    elif op == Op.CONTRAST:
        share = to_device_of(images, factor)
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        mean = dali_math.floor(fn.reductions.mean(grey) + 0.5)
        result = fn.cast(images * share + (mean * (1.0 - share) + _TRUNCATION_OFFSET), dtype=types.UINT8)
    elif op == Op.COLOUR:
        share = to_device_of(images, factor)
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        result = fn.cast(images * share + (grey * (1.0 - share) + _TRUNCATION_OFFSET), dtype=types.UINT8)
    else:
        kernel = types.Constant(_SMOOTHING_KERNEL) * (1.0 - factor) + types.Constant(_IDENTITY_KERNEL) * factor
        result = fn.filter(images, to_device_of(images, kernel), dtype=types.UINT8)
    return result


def map_values(images: Any, op: Any, factor: Any) -> Any:
    """Apply posterize or solarize, as Pillow's ImageOps do, or solarize_add, as RandAugment's reference does."""
    if op == Op.POSTERIZE:
        mask = 256.0 - dali_math.floor(dali_math.pow(2.0, 8.0 - factor) + 0.5)
        result = images & to_device_of(images, fn.cast(mask, dtype=types.UINT8))
    elif op == Op.SOLARIZE:
        is_inverted = images >= to_device_of(images, fn.cast(factor, dtype=types.INT32))
        result = images ^ is_inverted * types.Constant(255, dtype=types.UINT8)
    else:
        is_dark = images < GREY
        result = images + is_dark * to_device_of(images, fn.cast(factor, dtype=types.UINT8))
    return result


@do_not_convert
def autocontrast(images: Any) -> Any:
    """Stretch each channel's values to 0 to 255, as Pillow's ImageOps.autocontrast does."""
    low, high = fn.reductions.min(images, axes=[0, 1]), fn.reductions.max(images, axes=[0, 1])
    span = fn.cast(high, dtype=types.FLOAT) - low
    is_flat = fn.cast(span == 0, dtype=types.FLOAT)  # a channel with a single value doesn't change
    scale = (1.0 - is_flat) * 255.0 / (span + is_flat) + is_flat
    stretched = (fn.cast(images, dtype=types.FLOAT) - (1.0 - is_flat) * low) * scale
    return fn.cast(stretched + _TRUNCATION_OFFSET, dtype=types.UINT8)


@do_not_convert
def cutout(images: Any, box: Any) -> Any:
    """Fill a box of each image with grey. `box`: top, left, height, width."""
    return fn.erase(
        images,
        anchor=fn.cast(box[0:2], dtype=types.FLOAT),
        shape=fn.cast(box[2:4], dtype=types.FLOAT),
        axes=[0, 1],
        fill_value=float(GREY),
    )


def random_erasing(
    images: Any,
    parameters: Mapping[str, Any],
    config: AugmentConfig,
    image_size: tuple[int, int],
    num_channels: int = 3,
) -> Any:
    """Fill the `erasing_box` of normalised images with normal noise or with 0, which is the mean.

    Images are [num_channels, height, width], of `image_size` or of the smaller size in `parameters`. The noise is a
    window of `erasing_noise` whose corner is `erasing_noise_corner`.
    """
    if config.random_erasing_probability > 0.0:
        box, corner = parameters["erasing_box"], parameters["erasing_noise_corner"]
        if box[2] > 0:
            region = {
                "anchor": fn.cast(box[0:2], dtype=types.FLOAT),
                "shape": fn.cast(box[2:4], dtype=types.FLOAT),
                "axes": [1, 2],
                "fill_value": 0.0,
            }
            images = fn.erase(images, **region)
            if config.random_erasing_with == "noise":
                # A constant of that device isn't copied in each step. Named arguments are always on the CPU.
                all_noise = types.Constant(erasing_noise(image_size)[:num_channels], device=images.device)
                shape = parameters.get("image_size", list(image_size))
                noise = fn.slice(all_noise, start=corner, shape=shape, axes=[1, 2])
                images = images + noise - fn.erase(noise, **region)
    return images


def erasing_noise(image_size: tuple[int, int]) -> np.ndarray:
    """Return normal noise [3, 2 * height, 2 * width] float32, the same in every run."""
    height, width = image_size
    generator = np.random.Generator(np.random.Philox(_NOISE_SEED))
    return generator.standard_normal((3, 2 * height, 2 * width)).astype(np.float32)


@do_not_convert
def _interpolation(config: AugmentConfig) -> Any:
    """Return the interpolation of geometric operations: linear in timm, nearest neighbour in the other references."""
    is_timm = config.policy == "randaugment" and config.op_set == "timm"
    return types.INTERP_LINEAR if is_timm else types.INTERP_NN


@do_not_convert
def to_device_of(images: Any, values: Any) -> Any:
    """Copy values from the CPU to the device of the images."""
    return values.gpu() if images.device == "gpu" else values
