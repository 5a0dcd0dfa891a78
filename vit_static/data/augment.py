"""Random parameters of the augmentations that follow the crop: RandAugment and its relatives, jitter and erasing.

Pure functions from uniform random numbers to the parameters of operations, for a whole batch at a time; `dali_ops`
applies the operations. An image passes through a few layers with one operation each: first the layers of its policy,
then those of color jitter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vit_static.config.data_schema import AugmentConfig

NUM_ERASING_ATTEMPTS = 10  # as in timm's RandomErasing
REFERENCE_SIZE = 224  # the image size for which the policies give distances in pixels
_NUM_POLICY_DRAWS, _NUM_JITTER_DRAWS, _NUM_ERASING_DRAWS = 8, 4, 28  # per layer, per image, per image


class Op:
    """The numbers by which the pipeline knows the operations. The comments describe each operation's `factor`."""

    NONE = 0
    GEOMETRIC = 1  # not used: the operation takes a matrix
    BRIGHTNESS = 2  # for this and the next three, 1 leaves the image as it is; here 0 gives black
    CONTRAST = 3  # 0 gives the image's mean grey
    COLOUR = 4  # 0 gives a grey image
    SHARPNESS = 5  # 0 gives a smoothed image
    POSTERIZE = 6  # number of bits that remain, 0 to 8
    SOLARIZE = 7  # the lowest value that is inverted, 0 to 256
    SOLARIZE_ADD = 8  # the amount added to values below 128
    AUTOCONTRAST = 9
    EQUALIZE = 10
    CUTOUT = 11  # half the side of the box, as a share of the image's side
    BLUR = 12  # standard deviation of the Gaussian, in pixels


@dataclass(frozen=True)
class _PolicyOp:
    """One operation of a policy, whose factor goes from `start` to `end` as the magnitude goes from 0 to 1.

    With `is_signed`, the factor has a random sign, and is a distance (with `matrix`) or a difference from 1 (without).
    With `is_integer`, the distance from `start` is truncated to an integer. `matrix` is one of shear_x, shear_y,
    translate_x, translate_y and rotate.
    """

    op: int
    start: float = 0.0
    end: float = 0.0
    is_signed: bool = False
    is_integer: bool = False
    matrix: str = ""

    def factor(self, magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
        change = (self.end - self.start) * magnitude
        factor = self.start + (np.trunc(change + np.copysign(1e-6, change)) if self.is_integer else change)
        if not self.is_signed:
            return factor
        return sign * factor if self.matrix else 1.0 + sign * factor


def _geometric_op(matrix: str, max_factor: float) -> _PolicyOp:
    return _PolicyOp(Op.GEOMETRIC, 0.0, max_factor, is_signed=True, matrix=matrix)


def _geometric_ops(max_shear: float, max_translation: float, max_degrees: float) -> list[_PolicyOp]:
    """Return shears, translations (as shares of the image's side) and a rotation, each up to a limit either way."""
    return [
        _geometric_op("shear_x", max_shear),
        _geometric_op("shear_y", max_shear),
        _geometric_op("translate_x", max_translation),
        _geometric_op("translate_y", max_translation),
        _geometric_op("rotate", max_degrees),
    ]


_BLEND_OPS = (Op.BRIGHTNESS, Op.COLOUR, Op.CONTRAST, Op.SHARPNESS)
_OPS_WITHOUT_FACTOR = [_PolicyOp(Op.AUTOCONTRAST), _PolicyOp(Op.EQUALIZE)]
_INVERT = _PolicyOp(Op.SOLARIZE)  # every value from 0 up
_SOLARIZE_ADD = _PolicyOp(Op.SOLARIZE_ADD, 0, 110, is_integer=True)

# RandAugment, arXiv 1909.13719. google: the 16 operations of the reference (tensorflow/tpu,
# efficientnet/autoaugment.py), whose pixels are those of an image of 224. timm: the operations of its
# 'rand-m9-mstd0.5-inc1', which DeiT uses, where a greater magnitude always changes the image more.
_GOOGLE_OPS = [
    *_OPS_WITHOUT_FACTOR,
    _INVERT,
    *_geometric_ops(0.3, 100 / REFERENCE_SIZE, 30.0),
    _PolicyOp(Op.POSTERIZE, 0, 4, is_integer=True),
    _PolicyOp(Op.SOLARIZE, 0, 256, is_integer=True),
    _SOLARIZE_ADD,
    *(_PolicyOp(op, 0.1, 1.9) for op in _BLEND_OPS),
    _PolicyOp(Op.CUTOUT, 0, 40 / REFERENCE_SIZE),
]
_TIMM_OPS = [
    *_OPS_WITHOUT_FACTOR,
    _INVERT,
    *_geometric_ops(0.3, 0.45, 30.0),
    _PolicyOp(Op.POSTERIZE, 4, 0, is_integer=True),
    _PolicyOp(Op.SOLARIZE, 256, 0, is_integer=True),
    _SOLARIZE_ADD,
    *(_PolicyOp(op, 0.0, 0.9, is_signed=True) for op in _BLEND_OPS),
]
# TrivialAugment, arXiv 2103.10158: the wide set, with torchvision's ranges and 31 steps. Its 32 pixels are those of an
# image of 224, too.
_TRIVIAL_OPS = [
    _PolicyOp(Op.NONE),
    *_OPS_WITHOUT_FACTOR,
    *_geometric_ops(0.99, 32 / REFERENCE_SIZE, 135.0),
    _PolicyOp(Op.POSTERIZE, 8, 2),
    _PolicyOp(Op.SOLARIZE, 255, 0),
    *(_PolicyOp(op, 0.0, 0.99, is_signed=True) for op in _BLEND_OPS),
]
_NUM_TRIVIAL_STEPS = 31
# DeiT III's 3-Augment, arXiv 2204.07118: grey, inverted from 128 up, or blurred.
_THREE_AUGMENT_OPS = [
    _PolicyOp(Op.COLOUR),
    _PolicyOp(Op.SOLARIZE, 128, 128),
    _PolicyOp(Op.BLUR, 0.1, 2.0),
]
_JITTER_OPS = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOUR)
_JITTER_ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def ops_per_layer(config: AugmentConfig) -> list[set[int]]:
    """Return the operations that each layer may apply."""
    policy_layers = [{policy_op.op for policy_op in _policy_ops(config)}] * _num_policy_layers(config)
    return policy_layers + ([set(_JITTER_OPS)] * 3 if config.color_jitter > 0.0 else [])


def num_draws_per_image(config: AugmentConfig) -> int:
    """Return how many uniform random numbers an image needs: a multiple of 4, or 0 without augmentation."""
    return (
        _NUM_POLICY_DRAWS * _num_policy_layers(config)
        + _NUM_JITTER_DRAWS * (config.color_jitter > 0.0)
        + _NUM_ERASING_DRAWS * (config.random_erasing_probability > 0.0)
    )


def op_parameters(draws: np.ndarray, config: AugmentConfig, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the parameters that `dali_ops` takes, float32 or int32, as far as the config needs them.

    `draws`: uniform random numbers in [0, 1), [B, num_draws_per_image]. The result has `op` [B, layers]; `factor`
    [B, layers]; `matrix` [B, layers, 2, 3], from a position in the result (x, y, 1) to one in the image, in pixels;
    `box` [B, layers, 4] of cutout: top, left, height, width; with random erasing `erasing_box` [B, 4], whose height is
    0 where nothing is erased, and `erasing_noise_corner` [B, 2] (y, x).
    """
    parameters: dict[str, np.ndarray] = {}
    num_layers = _num_policy_layers(config)
    policy_draws, rest = np.split(draws.astype(np.float64), [_NUM_POLICY_DRAWS * num_layers], axis=1)
    draws_per_layer = np.split(policy_draws, num_layers, axis=1) if num_layers else []
    layers = [_policy_layer(layer_draws, config, image_size) for layer_draws in draws_per_layer]
    if config.color_jitter > 0.0:
        jitter_draws, rest = np.split(rest, [_NUM_JITTER_DRAWS], axis=1)
        layers += _jitter_layers(jitter_draws, config.color_jitter)
    ops = set().union(*ops_per_layer(config))
    is_needed = {
        "op": bool(ops),
        "factor": bool(ops),
        "matrix": Op.GEOMETRIC in ops,
        "box": Op.CUTOUT in ops,
    }
    for name in (name for name in is_needed if is_needed[name]):
        parameters[name] = np.stack([layer[name] for layer in layers], axis=1)
    if config.random_erasing_probability > 0.0:
        parameters |= _erasing_parameters(rest, config, image_size)
    return parameters


def _num_policy_layers(config: AugmentConfig) -> int:
    return {"none": 0, "randaugment": config.num_ops, "trivialaugment": 1, "three_augment": 1}[config.policy]


def _policy_ops(config: AugmentConfig) -> list[_PolicyOp]:
    randaugment_ops = {"google": _GOOGLE_OPS, "timm": _TIMM_OPS}[config.op_set]
    return {
        "none": [],
        "randaugment": randaugment_ops,
        "trivialaugment": _TRIVIAL_OPS,
        "three_augment": _THREE_AUGMENT_OPS,
    }[config.policy]


def _policy_layer(draws: np.ndarray, config: AugmentConfig, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the parameters of one layer of the policy, without the axis of the layers.

    `draws` [B, 8]: 0 selects the operation, 1 decides whether it is applied, 2 gives the sign, 3 and 4 the magnitude,
    5 and 6 the centre of a box; 7 is not used.
    """
    policy_ops = _policy_ops(config)
    selected = (draws[:, 0] * len(policy_ops)).astype(int)
    sign = np.where(draws[:, 2] < 0.5, -1.0, 1.0)
    magnitude = _magnitude(draws[:, 3], draws[:, 4], config)
    layer = _empty_layer(len(draws))
    for number, policy_op in enumerate(policy_ops):
        is_selected = selected == number
        factor = policy_op.factor(magnitude[is_selected], sign[is_selected])
        layer["op"][is_selected], layer["factor"][is_selected] = policy_op.op, factor
        if policy_op.matrix:
            layer["matrix"][is_selected] = _matrix(policy_op.matrix, factor, image_size)
        if policy_op.op == Op.CUTOUT:
            layer["box"][is_selected] = _cutout_box(factor, draws[is_selected, 5:7], image_size)
    if config.policy == "trivialaugment":  # numbers of bits are rounded; an integer is above 59.5 from 60 up
        layer["factor"] = np.where(layer["op"] == Op.POSTERIZE, np.round(layer["factor"]), layer["factor"])
        layer["factor"] = np.where(layer["op"] == Op.SOLARIZE, np.ceil(layer["factor"]), layer["factor"])
    if config.policy == "randaugment":
        layer["op"][draws[:, 1] >= config.op_probability] = Op.NONE
    return layer


def _magnitude(draw: np.ndarray, second_draw: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """Return magnitudes from 0 to 1. RandAugment's are normally distributed, by the Box-Muller method."""
    if config.policy == "three_augment":
        return draw
    if config.policy == "trivialaugment":
        return np.floor(draw * _NUM_TRIVIAL_STEPS) / (_NUM_TRIVIAL_STEPS - 1)
    normal = np.sqrt(-2.0 * np.log1p(-draw)) * np.cos(2.0 * math.pi * second_draw)
    return np.clip(config.magnitude + config.magnitude_std * normal, 0.0, 10.0) / 10.0


def _empty_layer(num_images: int) -> dict[str, np.ndarray]:
    return {
        "op": np.zeros(num_images, np.int32),
        "factor": np.zeros(num_images, np.float32),
        "matrix": np.tile(np.eye(2, 3, dtype=np.float32), (num_images, 1, 1)),
        "box": np.zeros((num_images, 4), np.int32),
    }


def _matrix(name: str, factor: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return matrices [B, 2, 3]. Shears keep the top left corner in place, as in the references; rotations are
    counter-clockwise about the centre."""
    height, width = image_size
    matrix = np.tile(np.eye(2, 3), (len(factor), 1, 1))
    if name == "rotate":
        cos, sin = np.cos(np.radians(factor)), np.sin(np.radians(factor))
        matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cos, -sin, sin, cos
        centre = np.array([width / 2, height / 2])
        matrix[:, :, 2] = centre - matrix[:, :, :2] @ centre
        return matrix
    row, column, scale = {
        "shear_x": (0, 1, 1.0),
        "shear_y": (1, 0, 1.0),
        "translate_x": (0, 2, width),
        "translate_y": (1, 2, height),
    }[name]
    matrix[:, row, column] = scale * factor
    return matrix


def _cutout_box(half_side: np.ndarray, centre: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return boxes [B, 4]: the part inside the image of a square about `centre`, a position in shares of the image."""
    size = np.array(image_size)
    middle = np.floor(centre * size)
    half = np.trunc(half_side[:, None] * size + 1e-6)
    start, stop = np.maximum(middle - half, 0), np.minimum(middle + half, size)
    return np.concatenate([start, stop - start], axis=1)


def _jitter_layers(draws: np.ndarray, strength: float) -> list[dict[str, np.ndarray]]:
    """Return three layers: brightness, contrast and saturation in random order, each with its own factor.

    `draws` [B, 4]: 0 selects one of the six orders, 1 to 3 give the factors.
    """
    order = _JITTER_ORDERS[(draws[:, 0] * len(_JITTER_ORDERS)).astype(int)]  # [B, 3]
    factors = 1.0 + strength * (2.0 * draws[:, 1:4] - 1.0)  # [B, 3], in the order of _JITTER_OPS
    layers = []
    for position in range(3):
        layer = _empty_layer(len(draws))
        layer["op"] = np.array(_JITTER_OPS, np.int32)[order[:, position]]
        layer["factor"] = np.take_along_axis(factors, order[:, position : position + 1], axis=1)[:, 0].astype(
            np.float32
        )
        layers.append(layer)
    return layers


def _erasing_parameters(draws: np.ndarray, config: AugmentConfig, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the boxes of random erasing, arXiv 1708.04896, as timm draws them.

    In up to ten attempts, the share of the area is uniform and the aspect ratio is uniform in its logarithm; the first
    box that is smaller than the image gets a uniform position. `draws` [B, 28]: 0 decides whether the image is erased,
    1-10 areas, 11-20 aspect ratios, 21 and 22 the position, 23 and 24 the corner of the noise; the rest is not used.
    """
    height, width = image_size
    min_area, max_area = config.random_erasing_area
    log_min, log_max = (math.log(ratio) for ratio in config.random_erasing_aspect_ratio)
    area_draws, aspect_draws = draws[:, 1 : 1 + NUM_ERASING_ATTEMPTS], draws[:, 11 : 11 + NUM_ERASING_ATTEMPTS]
    area = height * width * (min_area + (max_area - min_area) * area_draws)
    aspect_ratio = np.exp(log_min + (log_max - log_min) * aspect_draws)
    heights, widths = np.round(np.sqrt(area * aspect_ratio)), np.round(np.sqrt(area / aspect_ratio))  # [B, 10]
    fits = (heights < height) & (widths < width)
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(draws))
    is_erased = fits.any(axis=1) & (draws[:, 0] < config.random_erasing_probability)
    box_height = np.where(is_erased, heights[rows, first], 0)
    box_width = np.where(is_erased, widths[rows, first], 0)
    top = np.floor(draws[:, 21] * (height - box_height + 1))
    left = np.floor(draws[:, 22] * (width - box_width + 1))
    box = np.stack([top, left, box_height, box_width], axis=1).astype(np.int32)
    corner = np.floor(draws[:, 23:25] * (np.array(image_size) + 1)).astype(np.int32)
    return {"erasing_box": box, "erasing_noise_corner": corner}
