"""What is done to a training image besides its crop and flip: from uniform draws to the parameters of operations.

Pure functions of the draws, for a batch at a time; operations.py does what they say. An image goes through a few
layers, one operation each: those of its policy, then those of colour jitter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vit_static.config.schema import AugmentConfig

ERASE_ATTEMPTS = 10  # timm's RandomErasing
REFERENCE_SIDE = 224  # the image that the policies' pixels are of
_DRAWS_A_LAYER, _DRAWS_OF_JITTER, _DRAWS_OF_ERASING = 8, 4, 28


class Op:
    """An operation's number; what its `factor` is."""

    NONE = 0
    GEOMETRIC = 1  # its matrix
    BRIGHTNESS = 2  # this and the next three: 1 leaves the image, 0 gives black, ...
    CONTRAST = 3  # ... its mean grey,
    COLOUR = 4  # its grey,
    SHARPNESS = 5  # or the smoothed image; above 1 away from it
    POSTERIZE = 6  # bits that are kept, 0 to 8
    SOLARIZE = 7  # values from this one up are inverted, 0 to 256
    SOLARIZE_ADD = 8  # what is added to values below 128
    AUTOCONTRAST = 9
    EQUALIZE = 10
    CUTOUT = 11  # its box
    BLUR = 12  # the Gaussian's deviation, in pixels


@dataclass(frozen=True)
class _Operation:
    """A policy's operation, whose factor goes from `first` to `last` as the magnitude goes from 0 to 1.

    `signed`: it is that much, as a move, or that much more than 1, or less. `matrix`: shear_x, shear_y, translate_x,
    translate_y, rotate.
    """

    kind: int
    first: float = 0.0
    last: float = 0.0
    signed: bool = False
    whole: bool = False  # the way from `first` is cut off to a whole number
    matrix: str = ""

    def factor(self, magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
        way = (self.last - self.first) * magnitude
        found = self.first + (np.trunc(way + np.copysign(1e-6, way)) if self.whole else way)
        if not self.signed:
            return found
        return sign * found if self.matrix else 1.0 + sign * found


def _geometric(matrix: str, most: float) -> _Operation:
    return _Operation(Op.GEOMETRIC, 0.0, most, signed=True, matrix=matrix)


def _moves(shear: float, translate: float, degrees: float) -> list[_Operation]:
    """Shears by a share, translations by a share of the side, a rotation by degrees: up to, in both directions."""
    return [
        _geometric("shear_x", shear),
        _geometric("shear_y", shear),
        _geometric("translate_x", translate),
        _geometric("translate_y", translate),
        _geometric("rotate", degrees),
    ]


_BLENDS = (Op.BRIGHTNESS, Op.COLOUR, Op.CONTRAST, Op.SHARPNESS)
_PLAIN = [_Operation(Op.AUTOCONTRAST), _Operation(Op.EQUALIZE)]
_INVERT = _Operation(Op.SOLARIZE)  # from 0 up
_SOLARIZE_ADD = _Operation(Op.SOLARIZE_ADD, 0, 110, whole=True)

# RandAugment, arXiv 1909.13719. google: the reference's 16 (tensorflow/tpu, efficientnet/autoaugment.py), whose pixels
# are of an image of 224. timm: those of its 'rand-m9-mstd0.5-inc1', as DeiT has it, where more is always stronger.
_GOOGLE = [
    *_PLAIN,
    _INVERT,
    *_moves(0.3, 100 / REFERENCE_SIDE, 30.0),
    _Operation(Op.POSTERIZE, 0, 4, whole=True),
    _Operation(Op.SOLARIZE, 0, 256, whole=True),
    _SOLARIZE_ADD,
    *(_Operation(kind, 0.1, 1.9) for kind in _BLENDS),
    _Operation(Op.CUTOUT, 0, 40 / REFERENCE_SIDE),
]
_TIMM = [
    *_PLAIN,
    _INVERT,
    *_moves(0.3, 0.45, 30.0),
    _Operation(Op.POSTERIZE, 4, 0, whole=True),
    _Operation(Op.SOLARIZE, 256, 0, whole=True),
    _SOLARIZE_ADD,
    *(_Operation(kind, 0.0, 0.9, signed=True) for kind in _BLENDS),
]
# TrivialAugment, arXiv 2103.10158, the wide set, with torchvision's ranges and 31 steps. Its 32 pixels are of 224, too.
_TRIVIAL = [
    _Operation(Op.NONE),
    *_PLAIN,
    *_moves(0.99, 32 / REFERENCE_SIDE, 135.0),
    _Operation(Op.POSTERIZE, 8, 2),
    _Operation(Op.SOLARIZE, 255, 0),
    *(_Operation(kind, 0.0, 0.99, signed=True) for kind in _BLENDS),
]
_TRIVIAL_STEPS = 31
# DeiT III's 3-Augment, arXiv 2204.07118: grey, inverted from 128 up, or blurred.
_THREE = [
    _Operation(Op.COLOUR),
    _Operation(Op.SOLARIZE, 128, 128),
    _Operation(Op.BLUR, 0.1, 2.0),
]
_JITTERED = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOUR)
_ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def layer_kinds(config: AugmentConfig) -> list[set[int]]:
    """What each layer may do."""
    of_policy = [{operation.kind for operation in _policy_operations(config)}] * _num_policy_layers(config)
    return of_policy + ([set(_JITTERED)] * 3 if config.color_jitter > 0.0 else [])


def num_draws_per_image(config: AugmentConfig) -> int:
    """How many uniform numbers an image takes, a multiple of 4; 0 where nothing is done."""
    return (
        _DRAWS_A_LAYER * _num_policy_layers(config)
        + _DRAWS_OF_JITTER * (config.color_jitter > 0.0)
        + _DRAWS_OF_ERASING * (config.random_erasing_probability > 0.0)
    )


def op_parameters(draws: np.ndarray, config: AugmentConfig, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Of draws [B, num_draws] in [0, 1), what operations.py takes, float32 or int32, as far as the config needs it:

    `kind` [B, layers]; `factor` [B, layers]; `matrix` [B, layers, 2, 3], from a place in the result (x, y, 1) to one in
    the image, in pixels; `box` [B, layers, 4], top, left, height, width; where images are erased `erase_box`
    [B, 4], of height 0 where nothing is, and `erase_window` [B, 2], the noise's corner (y, x).
    """
    found: dict[str, np.ndarray] = {}
    num_layers = _num_policy_layers(config)
    of_layers, rest = np.split(draws.astype(np.float64), [_DRAWS_A_LAYER * num_layers], axis=1)
    split = np.split(of_layers, num_layers, axis=1) if num_layers else []
    layers = [_policy_layer(part, config, image_size) for part in split]
    if config.color_jitter > 0.0:
        of_jitter, rest = np.split(rest, [_DRAWS_OF_JITTER], axis=1)
        layers += _jitter_layers(of_jitter, config.color_jitter)
    kinds = set().union(*layer_kinds(config))
    needed = {
        "kind": bool(kinds),
        "factor": bool(kinds),
        "matrix": Op.GEOMETRIC in kinds,
        "box": Op.CUTOUT in kinds,
    }
    for name in (name for name, is_needed in needed.items() if is_needed):
        found[name] = np.stack([layer[name] for layer in layers], axis=1)
    if config.random_erasing_probability > 0.0:
        found |= _erasing(rest, config, image_size)
    return found


def _num_policy_layers(config: AugmentConfig) -> int:
    return {"none": 0, "randaugment": config.num_ops, "trivialaugment": 1, "three_augment": 1}[config.policy]


def _policy_operations(config: AugmentConfig) -> list[_Operation]:
    of_randaugment = {"google": _GOOGLE, "timm": _TIMM}[config.op_set]
    return {"none": [], "randaugment": of_randaugment, "trivialaugment": _TRIVIAL, "three_augment": _THREE}[
        config.policy
    ]


def _policy_layer(draws: np.ndarray, config: AugmentConfig, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Of draws [B, 8]: which operation, whether at all, the sign, two for the magnitude, two for a box's centre."""
    operations = _policy_operations(config)
    chosen = (draws[:, 0] * len(operations)).astype(int)
    sign = np.where(draws[:, 2] < 0.5, -1.0, 1.0)
    magnitude = _magnitude(draws[:, 3], draws[:, 4], config)
    layer = _empty_layer(len(draws))
    for number, operation in enumerate(operations):
        here = chosen == number
        factor = operation.factor(magnitude[here], sign[here])
        layer["kind"][here], layer["factor"][here] = operation.kind, factor
        if operation.matrix:
            layer["matrix"][here] = _matrix(operation.matrix, factor, image_size)
        if operation.kind == Op.CUTOUT:
            layer["box"][here] = _cutout(factor, draws[here, 5:7], image_size)
    if config.policy == "trivialaugment":  # bits are rounded; a whole value is above 59.5 from 60 up
        layer["factor"] = np.where(layer["kind"] == Op.POSTERIZE, np.round(layer["factor"]), layer["factor"])
        layer["factor"] = np.where(layer["kind"] == Op.SOLARIZE, np.ceil(layer["factor"]), layer["factor"])
    if config.policy == "randaugment":
        layer["kind"][draws[:, 1] >= config.op_probability] = Op.NONE
    return layer


def _magnitude(draw: np.ndarray, other: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """0 to 1. RandAugment's is the config's, with a deviation of its own by Box and Muller's method."""
    if config.policy == "three_augment":
        return draw
    if config.policy == "trivialaugment":
        return np.floor(draw * _TRIVIAL_STEPS) / (_TRIVIAL_STEPS - 1)
    normal = np.sqrt(-2.0 * np.log1p(-draw)) * np.cos(2.0 * math.pi * other)
    return np.clip(config.magnitude + config.magnitude_std * normal, 0.0, 10.0) / 10.0


def _empty_layer(num_images: int) -> dict[str, np.ndarray]:
    return {
        "kind": np.zeros(num_images, np.int32),
        "factor": np.zeros(num_images, np.float32),
        "matrix": np.tile(np.eye(2, 3, dtype=np.float32), (num_images, 1, 1)),
        "box": np.zeros((num_images, 4), np.int32),
    }


def _matrix(name: str, factor: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """[B, 2, 3]. Shears keep the upper left corner, as the references' do; rotations the centre, counter-clockwise."""
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


def _cutout(half_side: np.ndarray, centre: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """[B, 4]: a square of twice `half_side`, a share of the side, about a place in the image; what of it is inside."""
    size = np.array(image_size)
    middle = np.floor(centre * size)
    half = np.trunc(half_side[:, None] * size + 1e-6)
    first, behind = np.maximum(middle - half, 0), np.minimum(middle + half, size)
    return np.concatenate([first, behind - first], axis=1)


def _jitter_layers(draws: np.ndarray, strength: float) -> list[dict[str, np.ndarray]]:
    """Of draws [B, 4]: brightness, contrast and saturation, each by its own factor, in one of their six orders."""
    order = _ORDERS[(draws[:, 0] * len(_ORDERS)).astype(int)]  # [B, 3]
    factors = 1.0 + strength * (2.0 * draws[:, 1:4] - 1.0)  # [B, 3], by kind
    layers = []
    for place in range(3):
        layer = _empty_layer(len(draws))
        layer["kind"] = np.array(_JITTERED, np.int32)[order[:, place]]
        layer["factor"] = np.take_along_axis(factors, order[:, place : place + 1], axis=1)[:, 0].astype(np.float32)
        layers.append(layer)
    return layers


def _erasing(draws: np.ndarray, config: AugmentConfig, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Random erasing, arXiv 1708.04896, as timm has it: ten tries at a share of the area (uniform) and an aspect ratio
    (uniform in its logarithm); the first that is smaller than the image is placed uniformly.

    `draws` [B, 28]: 0 whether, 1-10 areas, 11-20 aspects, 21 and 22 the place, 23 and 24 the noise's corner.
    """
    height, width = image_size
    least_area, most_area = config.random_erasing_area
    log_least, log_most = (math.log(aspect) for aspect in config.random_erasing_aspect_ratio)
    area = height * width * (least_area + (most_area - least_area) * draws[:, 1:11])
    aspect = np.exp(log_least + (log_most - log_least) * draws[:, 11:21])
    tried_height, tried_width = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (tried_height < height) & (tried_width < width)
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(draws))
    erased = fits.any(axis=1) & (draws[:, 0] < config.random_erasing_probability)
    box_height = np.where(erased, tried_height[rows, first], 0)
    box_width = np.where(erased, tried_width[rows, first], 0)
    top = np.floor(draws[:, 21] * (height - box_height + 1))
    left = np.floor(draws[:, 22] * (width - box_width + 1))
    box = np.stack([top, left, box_height, box_width], axis=1).astype(np.int32)
    window = np.floor(draws[:, 23:25] * (np.array(image_size) + 1)).astype(np.int32)
    return {"erase_box": box, "erase_window": window}
