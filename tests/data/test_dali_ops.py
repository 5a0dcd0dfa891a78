"""Pixels of each augmentation with fixed parameters against Pillow's; random erasing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.sets import photo
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from vit_static.config.data_schema import AugmentConfig
from vit_static.data.augment import Op, num_draws_per_image, op_parameters
from vit_static.data.dali_ops import apply_ops, erasing_noise, random_erasing

HEIGHT, WIDTH = 96, 128
PHOTOS = [photo(HEIGHT, WIDTH, seed=seed) for seed in range(6)]
LOW_CONTRAST = [Image.eval(image, lambda value: 60 + value // 3) for image in PHOTOS]
GREY = (128, 128, 128)
NEAREST, LINEAR = AugmentConfig(policy="randaugment"), AugmentConfig(policy="randaugment", op_set="timm")
THREE = AugmentConfig(policy="three_augment")

PilOperation = Callable[[Image.Image], Image.Image]


def run(images: list[Image.Image], inputs: dict[str, np.ndarray], config: AugmentConfig) -> np.ndarray:
    """Apply `apply_ops` in a pipeline, [num_images, height, width, 3]."""
    arrays = [np.asarray(image) for image in images]
    examples = [np.zeros((1, 1, 1, 1), np.uint8), *inputs.values()]

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None, enable_conditionals=True)
    def pipeline() -> Any:
        pixels, *values = fn.external_source(
            source=lambda n: (arrays, *inputs.values()),
            num_outputs=len(examples),
            batch=True,
            dtype=[types.to_dali_type(example.dtype) for example in examples],
            ndim=[example.ndim - 1 for example in examples],
            layout=["HWC", *[""] * len(inputs)],
        )
        return apply_ops(pixels, dict(zip(inputs, values)), config)  # noqa: B905 - DALI replaces zip by its own

    built = pipeline()
    built.build()
    return built.run()[0].as_array()


def apply_op(
    images: list[Image.Image], config: AugmentConfig, op: int, factor: float = 0.0, **inputs: Any
) -> np.ndarray:
    """Apply one operation to every image."""
    layers = config.num_ops if config.policy == "randaugment" else 1
    values = {
        "op": np.zeros((len(images), layers), np.int32),
        "factor": np.zeros((len(images), layers), np.float32),
        "matrix": np.tile(np.eye(2, 3, dtype=np.float32), (len(images), layers, 1, 1)),
        "box": np.zeros((len(images), layers, 4), np.int32),
    }
    for name, value in {"op": op, "factor": factor, **inputs}.items():
        values[name][:, 0] = value
    expected = op_parameters(np.zeros((1, num_draws_per_image(config))), config, (HEIGHT, WIDTH))
    return run(images, {name: value for name, value in values.items() if name in expected}, config)


def levels(ours: np.ndarray, images: list[Image.Image], operation: PilOperation) -> tuple[float, int]:
    """Return the differences from Pillow in grey levels: the mean of the worst image, and the largest of all pixels."""
    theirs = np.stack([np.asarray(operation(image)) for image in images])
    differences = np.abs(ours.astype(int) - theirs)
    print(f"mean {differences.mean(axis=(1, 2, 3)).max():.3f}, largest {differences.max()}")
    return float(differences.mean(axis=(1, 2, 3)).max()), int(differences.max())


def enhanced(enhance: Any, factor: float) -> PilOperation:
    return lambda image: enhance(image).enhance(factor)


BLENDS = {
    "brightness": (Op.BRIGHTNESS, ImageEnhance.Brightness),
    "contrast": (Op.CONTRAST, ImageEnhance.Contrast),
    "colour": (Op.COLOUR, ImageEnhance.Color),
}


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.55, 1.0, 1.45, 1.9])
@pytest.mark.parametrize("name", BLENDS)
def test_blends_differ_from_pillow_by_at_most_a_level(name: str, factor: float) -> None:
    op, enhance = BLENDS[name]
    mean, largest = levels(apply_op(PHOTOS, NEAREST, op, factor), PHOTOS, enhanced(enhance, factor))
    assert mean < 0.05 and largest <= 1


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 1.9])
def test_sharpness_is_pillows_except_at_the_border(factor: float) -> None:
    """Pillow rounds the smoothed image, and doesn't change the outermost pixels."""
    ours = apply_op(PHOTOS, NEAREST, Op.SHARPNESS, factor)
    theirs = [ImageEnhance.Sharpness(image).enhance(factor) for image in PHOTOS]
    mean, largest = levels(ours[:, 1:-1, 1:-1], theirs, lambda image: image.crop((1, 1, WIDTH - 1, HEIGHT - 1)))
    assert mean < 0.6 and largest <= 1
    assert levels(ours, PHOTOS, enhanced(ImageEnhance.Sharpness, factor))[0] < 1.0


@pytest.mark.parametrize("bits", range(9))
def test_posterize_is_pillows(bits: int) -> None:
    """With no bits, which Pillow refuses today, the image is black."""
    expected: PilOperation = (
        (lambda image: ImageOps.posterize(image, bits)) if bits else (lambda image: Image.new("RGB", image.size))
    )
    assert levels(apply_op(PHOTOS, NEAREST, Op.POSTERIZE, bits), PHOTOS, expected) == (0, 0)


@pytest.mark.parametrize("threshold", [0, 1, 77, 128, 255, 256])
def test_solarize_is_pillows(threshold: int) -> None:
    ours = apply_op(PHOTOS, NEAREST, Op.SOLARIZE, threshold)
    assert levels(ours, PHOTOS, lambda image: ImageOps.solarize(image, threshold)) == (0, 0)
    if threshold == 0:
        assert levels(ours, PHOTOS, ImageOps.invert) == (0, 0)


@pytest.mark.parametrize("amount", [0, 60, 110])
def test_solarize_add_adds_to_dark_values(amount: int) -> None:
    def expected(image: Image.Image) -> Image.Image:
        return Image.eval(image, lambda value: min(value + amount, 255) if value < 128 else value)

    assert levels(apply_op(PHOTOS, NEAREST, Op.SOLARIZE_ADD, amount), PHOTOS, expected) == (0, 0)


def test_autocontrast_differs_from_pillow_by_at_most_a_level() -> None:
    mean, largest = levels(apply_op(LOW_CONTRAST, NEAREST, Op.AUTOCONTRAST), LOW_CONTRAST, ImageOps.autocontrast)
    assert mean < 0.05 and largest <= 1
    flat = [Image.new("RGB", (WIDTH, HEIGHT), (10, 0, 255))]
    assert levels(apply_op(flat, NEAREST, Op.AUTOCONTRAST), flat, ImageOps.autocontrast) == (0, 0)


@pytest.mark.parametrize("images", [PHOTOS, LOW_CONTRAST], ids=["photos", "low contrast"])
def test_equalize_is_close_to_pillows(images: list[Image.Image]) -> None:
    """DALI's is OpenCV's, which maps a value to the share of pixels below it; Pillow rounds that share to steps."""
    mean, largest = levels(apply_op(images, NEAREST, Op.EQUALIZE), images, ImageOps.equalize)
    assert mean < 4.5 and largest <= 8


def matrices() -> dict[str, np.ndarray]:
    """Return matrices from a position in the result to one in the image."""
    return {
        "shear_x": np.array([[1, 0.3, 0], [0, 1, 0]]),
        "shear_y": np.array([[1, 0, 0], [-0.17, 1, 0]]),
        "translate_x": np.array([[1, 0, 40], [0, 1, 0]]),
        "translate_y": np.array([[1, 0, 0], [0, 1, -12.5]]),
        "rotate": rotation_matrix(30.0),
    }


def rotation_matrix(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]])
    centre = np.array([WIDTH / 2, HEIGHT / 2])
    return np.column_stack([linear, centre - linear @ centre])


@pytest.mark.parametrize(
    ("config", "pil_filter", "bound"),
    [(NEAREST, Image.Resampling.NEAREST, 0.1), (LINEAR, Image.Resampling.BILINEAR, 1.0)],
    ids=["nearest", "linear"],
)
@pytest.mark.parametrize("name", matrices())
def test_geometric_operations_are_pillows(config: AugmentConfig, pil_filter: Any, bound: float, name: str) -> None:
    matrix = matrices()[name]
    coefficients = matrix.ravel().tolist()

    def expected(image: Image.Image) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, pil_filter, fillcolor=GREY)

    ours = apply_op(PHOTOS, config, Op.GEOMETRIC, matrix=matrix.astype(np.float32))
    assert levels(ours, PHOTOS, expected)[0] < bound


def test_a_rotation_has_pillows_direction() -> None:
    ours = apply_op(PHOTOS, LINEAR, Op.GEOMETRIC, matrix=rotation_matrix(20.0).astype(np.float32))

    def expected(image: Image.Image) -> Image.Image:
        return image.rotate(20.0, Image.Resampling.BILINEAR, fillcolor=GREY)

    assert levels(ours, PHOTOS, expected)[0] < 1.0


def test_cutout_is_a_grey_box() -> None:
    def expected(image: Image.Image) -> Image.Image:
        cut = image.copy()
        ImageDraw.Draw(cut).rectangle((30, 20, 30 + 50 - 1, 20 + 40 - 1), fill=GREY)
        return cut

    assert levels(apply_op(PHOTOS, NEAREST, Op.CUTOUT, box=[20, 30, 40, 50]), PHOTOS, expected) == (0, 0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_close_to_pillows(sigma: float) -> None:
    """Pillow applies three box filters instead of a Gaussian."""
    ours = apply_op(PHOTOS, THREE, Op.BLUR, sigma)
    mean, largest = levels(ours, PHOTOS, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))
    assert mean < 0.7 and largest <= 12


def test_grey_differs_from_pillow_by_at_most_a_level() -> None:
    mean, largest = levels(apply_op(PHOTOS, THREE, Op.COLOUR), PHOTOS, lambda image: image.convert("L").convert("RGB"))
    assert mean < 0.05 and largest <= 1


POLICIES = {
    "randaugment": AugmentConfig(policy="randaugment", num_ops=3, magnitude_std=0.5),
    "timm": AugmentConfig(policy="randaugment", op_set="timm", op_probability=0.5, magnitude_std=0.5),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "three_augment": AugmentConfig(policy="three_augment", color_jitter=0.3),
    "jitter": AugmentConfig(color_jitter=0.4),
}


@pytest.mark.parametrize("name", POLICIES)
def test_pixels_dont_depend_on_the_rest_of_the_batch(name: str) -> None:
    """Permuting a batch permutes its results, and layers are applied one after the other."""
    config = POLICIES[name]
    images = [photo(HEIGHT, WIDTH, seed=seed) for seed in range(40)]
    draws = np.random.default_rng(1).random((40, num_draws_per_image(config)))
    values = op_parameters(draws, config, (HEIGHT, WIDTH))
    batch = run(images, values, config)
    order = np.random.default_rng(2).permutation(40)
    permuted = run([images[n] for n in order], {key: value[order] for key, value in values.items()}, config)
    np.testing.assert_array_equal(permuted, batch[order])
    layer_by_layer = images
    for layer in range(values["op"].shape[1]):
        single = {key: np.zeros_like(value) for key, value in values.items()}
        for key, value in values.items():
            single[key][:, layer] = value[:, layer]
        layer_by_layer = [Image.fromarray(array) for array in run(layer_by_layer, single, config)]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in layer_by_layer]), batch)
    is_changed = [not np.array_equal(ours, np.asarray(image)) for ours, image in zip(batch, images, strict=True)]
    assert sum(is_changed) > 15


def run_erasing(images: np.ndarray, box: np.ndarray, corner: np.ndarray, config: AugmentConfig) -> np.ndarray:
    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None, enable_conditionals=True)
    def pipeline() -> Any:
        pixels, boxes, corners = fn.external_source(
            source=lambda n: (images, box, corner), num_outputs=3, batch=True, layout=["CHW", "", ""]
        )
        parameters = {"erasing_box": boxes, "erasing_noise_corner": corners}
        return random_erasing(pixels, parameters, config, images.shape[2:])

    built = pipeline()
    built.build()
    return built.run()[0].as_array()


@pytest.mark.parametrize("random_erasing_with", ["noise", "mean"])
def test_random_erasing_fills_only_the_box(random_erasing_with: str) -> None:
    config = AugmentConfig(random_erasing_probability=0.5, random_erasing_with=random_erasing_with)
    images = np.random.default_rng(0).standard_normal((4, 3, HEIGHT, WIDTH)).astype(np.float32)
    box = np.array([[10, 20, 30, 40], [0, 0, 0, 0], [0, 0, 95, 127], [90, 120, 6, 8]], np.int32)
    corner = np.array([[0, 0], [5, 6], [96, 128], [50, 3]], np.int32)
    expected = images.copy()
    all_noise = erasing_noise((HEIGHT, WIDTH))
    for image, (top, left, height, width), (y, x) in zip(expected, box, corner, strict=True):
        noise = all_noise[:, y : y + HEIGHT, x : x + WIDTH] if random_erasing_with == "noise" else np.zeros_like(image)
        region = np.s_[:, top : top + height, left : left + width]
        image[region] = noise[region]
    np.testing.assert_allclose(run_erasing(images, box, corner, config), expected, atol=1e-6)


def test_erasing_noise_is_normal_and_always_the_same() -> None:
    noise = erasing_noise((HEIGHT, WIDTH))
    assert noise.shape == (3, 2 * HEIGHT, 2 * WIDTH)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_array_equal(noise, erasing_noise((HEIGHT, WIDTH)))
