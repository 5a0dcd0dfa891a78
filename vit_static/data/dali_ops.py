"""The operations of augment.py, of DALI's operators: for CPU and card from the same lines, without randomness.

They follow Pillow's definitions, as the references of RandAugment and its kin do. What differs, in grey levels of 255,
the mean of the worst of six photographs and the largest of all pixels (`./run.sh test tests/test_operations.py -rP`):

    brightness, contrast, posterize, solarize, solarize_add, cutout    0        0
    moves, nearest neighbours                                          0        0
    colour, grey                                                       0.001    1   rounding
    autocontrast                                                       0.02     1   rounding
    sharpness                                                          0.65    34   at the border, which Pillow leaves
                                                                                    as it is; within it 0.45 and 1
    moves, linear                                                      0.7     63   at the edge to the grey; within it
                                                                                    0.5 and 1, as Pillow cuts off
    blur                                                               0.6      9   Pillow's is three box filters
    equalize                                                           1.0      3   OpenCV's; 3.9 and 7 on photographs
                                                                                    of a third of the contrast
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import nvidia.dali.math as dali_math
from nvidia.dali import fn, types

from vit_static.config.schema import AugmentConfig
from vit_static.data.augment import Op, layer_kinds

GREY = 128  # what a moved image leaves behind, and what is cut out
_NOISE_SEED = 0
_SMOOTHING = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13.0  # Pillow's ImageFilter.SMOOTH
_IDENTITY = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
# A cast rounds to the nearest level, and Pillow's operations leave fractions out; a whole number stays what it is.
_TO_FLOOR = -0.498


def augmented(images: Any, parameters: Mapping[str, Any], config: AugmentConfig) -> Any:
    """Images [height, width, 3] uint8 after all layers, the same type. `parameters` as augment.parameters names them.

    DALI splits the batch by each `if`, so that an image pays for its own operations alone.
    """
    for layer, kinds in enumerate(layer_kinds(config)):
        kind, factor = parameters["kind"][layer], parameters["factor"][layer]
        if Op.GEOMETRIC in kinds and kind == Op.GEOMETRIC:
            matrix = parameters["matrix"][layer]
            images = fn.warp_affine(images, matrix=matrix, fill_value=GREY, interp_type=_interpolation(config))
        if (kind >= Op.BRIGHTNESS) & (kind <= Op.SHARPNESS):
            images = blended(images, kind, factor)
        if (kind >= Op.POSTERIZE) & (kind <= Op.SOLARIZE_ADD):
            images = of_single_values(images, kind, factor)
        if kinds & {Op.AUTOCONTRAST, Op.EQUALIZE}:
            if kind == Op.AUTOCONTRAST:
                images = autocontrast(images)
            elif kind == Op.EQUALIZE:
                images = fn.equalize(images)
        if Op.CUTOUT in kinds and kind == Op.CUTOUT:
            images = cut_out(images, parameters["box"][layer])
        if Op.BLUR in kinds and kind == Op.BLUR:
            images = fn.gaussian_blur(images, sigma=factor)
    return images


def blended(images: Any, kind: Any, factor: Any) -> Any:
    """Pillow's ImageEnhance: d + factor * (image - d); d is black, the mean grey, the grey or the smoothed image."""
    if kind == Op.BRIGHTNESS:
        result = fn.brightness_contrast(images, brightness=factor, brightness_shift=_TO_FLOOR / 255)
    elif kind == Op.CONTRAST:
        share = at(images, factor)
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        mean = dali_math.floor(fn.reductions.mean(grey) + 0.5)
        result = fn.cast(images * share + (mean * (1.0 - share) + _TO_FLOOR), dtype=types.UINT8)
    elif kind == Op.COLOUR:
        share = at(images, factor)
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        result = fn.cast(images * share + (grey * (1.0 - share) + _TO_FLOOR), dtype=types.UINT8)
    else:
        kernel = types.Constant(_SMOOTHING) * (1.0 - factor) + types.Constant(_IDENTITY) * factor
        result = fn.filter(images, at(images, kernel), dtype=types.UINT8)
    return result


def of_single_values(images: Any, kind: Any, factor: Any) -> Any:
    """Pillow's ImageOps.posterize and solarize, and the reference's solarize_add."""
    if kind == Op.POSTERIZE:
        mask = 256.0 - dali_math.floor(dali_math.pow(2.0, 8.0 - factor) + 0.5)
        result = images & at(images, fn.cast(mask, dtype=types.UINT8))
    elif kind == Op.SOLARIZE:
        inverted = images >= at(images, fn.cast(factor, dtype=types.INT32))
        result = images ^ inverted * types.Constant(255, dtype=types.UINT8)
    else:
        dark = images < GREY
        result = images + dark * at(images, fn.cast(factor, dtype=types.UINT8))
    return result


def autocontrast(images: Any) -> Any:
    """Pillow's ImageOps.autocontrast: each channel's least value becomes 0, its greatest 255."""
    least, most = fn.reductions.min(images, axes=[0, 1]), fn.reductions.max(images, axes=[0, 1])
    span = fn.cast(most, dtype=types.FLOAT) - least
    flat = fn.cast(span == 0, dtype=types.FLOAT)  # a channel of one value stays as it is
    scale = (1.0 - flat) * 255.0 / (span + flat) + flat
    stretched = (fn.cast(images, dtype=types.FLOAT) - (1.0 - flat) * least) * scale
    return fn.cast(stretched + _TO_FLOOR, dtype=types.UINT8)


def cut_out(images: Any, box: Any) -> Any:
    """`box`: top, left, height, width, in the image."""
    return fn.erase(
        images,
        anchor=fn.cast(box[0:2], dtype=types.FLOAT),
        shape=fn.cast(box[2:4], dtype=types.FLOAT),
        axes=[0, 1],
        fill_value=float(GREY),
    )


def erased(images: Any, parameters: Mapping[str, Any], config: AugmentConfig, image_size: tuple[int, int]) -> Any:
    """Normalised images [3, height, width] with their `erase_box` filled: with normal noise, a window of a fixed plate
    of it, or with 0, which is the mean."""
    if config.random_erasing_probability > 0.0:
        box, corner = parameters["erase_box"], parameters["erase_window"]
        if box[2] > 0:
            where = {
                "anchor": fn.cast(box[0:2], dtype=types.FLOAT),
                "shape": fn.cast(box[2:4], dtype=types.FLOAT),
                "axes": [1, 2],
                "fill_value": 0.0,
            }
            images = fn.erase(images, **where)
            if config.random_erasing_with == "noise":
                plate = at(images, types.Constant(noise_plate(image_size)))
                noise = fn.slice(plate, corner, list(image_size), axes=[1, 2])
                images = images + noise - fn.erase(noise, **where)
    return images


def noise_plate(image_size: tuple[int, int]) -> np.ndarray:
    """[3, 2 * height, 2 * width] float32, the same in every run."""
    height, width = image_size
    generator = np.random.Generator(np.random.Philox(_NOISE_SEED))
    return generator.standard_normal((3, 2 * height, 2 * width)).astype(np.float32)


def _interpolation(config: AugmentConfig) -> Any:
    """Of moved images: nearest neighbours, as in the references of RandAugment and TrivialAugment; timm's is linear."""
    is_timms = config.policy == "randaugment" and config.op_set == "timm"
    return types.INTERP_LINEAR if is_timms else types.INTERP_NN


def at(images: Any, values: Any) -> Any:
    """Values of the CPU, where the images are."""
    return values.gpu() if images.device == "gpu" else values
