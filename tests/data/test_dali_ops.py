"""Each augmentation's pixels against Pillow's, on fixed parameters; and erasing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.sets import photo
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from vit_static.config.schema import AugmentConfig
from vit_static.data.augment import Op, num_draws_per_image, op_parameters
from vit_static.data.dali_ops import augmented, erased, noise_plate

HEIGHT, WIDTH = 96, 128
PHOTOS = [photo(HEIGHT, WIDTH, seed=seed) for seed in range(6)]
LOW_CONTRAST = [Image.eval(image, lambda value: 60 + value // 3) for image in PHOTOS]
GREY = (128, 128, 128)
NEAREST, LINEAR = AugmentConfig(policy="randaugment"), AugmentConfig(policy="randaugment", op_set="timm")
THREE = AugmentConfig(policy="three_augment")

PilOperation = Callable[[Image.Image], Image.Image]


def run(images: list[Image.Image], inputs: dict[str, np.ndarray], config: AugmentConfig) -> np.ndarray:
    """`augmented`'s images in a pipeline of its own, [num_images, height, width, 3]."""
    arrays = [np.asarray(image) for image in images]
    kinds = [np.zeros((1, 1, 1, 1), np.uint8), *inputs.values()]

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None, enable_conditionals=True)
    def pipeline() -> Any:
        pixels, *values = fn.external_source(
            source=lambda n: (arrays, *inputs.values()),
            num_outputs=len(kinds),
            batch=True,
            dtype=[types.to_dali_type(kind.dtype) for kind in kinds],
            ndim=[kind.ndim - 1 for kind in kinds],
            layout=["HWC", *[""] * len(inputs)],
        )
        return augmented(pixels, dict(zip(inputs, values)), config)  # noqa: B905 - DALI puts its own zip in place

    built = pipeline()
    built.build()
    return built.run()[0].as_array()


def done(images: list[Image.Image], config: AugmentConfig, kind: int, factor: float = 0.0, **inputs: Any) -> np.ndarray:
    """Every image by one operation."""
    layers = config.num_ops if config.policy == "randaugment" else 1
    values = {
        "kind": np.zeros((len(images), layers), np.int32),
        "factor": np.zeros((len(images), layers), np.float32),
        "matrix": np.tile(np.eye(2, 3, dtype=np.float32), (len(images), layers, 1, 1)),
        "box": np.zeros((len(images), layers, 4), np.int32),
    }
    for name, value in {"kind": kind, "factor": factor, **inputs}.items():
        values[name][:, 0] = value
    needed = op_parameters(np.zeros((1, num_draws_per_image(config))), config, (HEIGHT, WIDTH))
    return run(images, {name: value for name, value in values.items() if name in needed}, config)


def levels(ours: np.ndarray, images: list[Image.Image], operation: PilOperation) -> tuple[float, int]:
    """Of the differences from Pillow's: the mean of the worst image, and the largest of all, in grey levels."""
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
def test_blends_are_pillows_to_a_level(name: str, factor: float) -> None:
    kind, enhance = BLENDS[name]
    mean, largest = levels(done(PHOTOS, NEAREST, kind, factor), PHOTOS, enhanced(enhance, factor))
    assert mean < 0.05 and largest <= 1


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 1.9])
def test_sharpness_is_pillows_but_at_the_border(factor: float) -> None:
    """Pillow rounds the smoothed image, and leaves the outermost pixels as they are."""
    ours = done(PHOTOS, NEAREST, Op.SHARPNESS, factor)
    theirs = [ImageEnhance.Sharpness(image).enhance(factor) for image in PHOTOS]
    mean, largest = levels(ours[:, 1:-1, 1:-1], theirs, lambda image: image.crop((1, 1, WIDTH - 1, HEIGHT - 1)))
    assert mean < 0.6 and largest <= 1
    assert levels(ours, PHOTOS, enhanced(ImageEnhance.Sharpness, factor))[0] < 1.0


@pytest.mark.parametrize("bits", range(9))
def test_posterize_is_pillows(bits: int) -> None:
    """No bits at all, which Pillow refuses today, are black."""
    expected: PilOperation = (
        (lambda image: ImageOps.posterize(image, bits)) if bits else (lambda image: Image.new("RGB", image.size))
    )
    assert levels(done(PHOTOS, NEAREST, Op.POSTERIZE, bits), PHOTOS, expected) == (0, 0)


@pytest.mark.parametrize("threshold", [0, 1, 77, 128, 255, 256])
def test_solarize_is_pillows(threshold: int) -> None:
    ours = done(PHOTOS, NEAREST, Op.SOLARIZE, threshold)
    assert levels(ours, PHOTOS, lambda image: ImageOps.solarize(image, threshold)) == (0, 0)
    if threshold == 0:
        assert levels(ours, PHOTOS, ImageOps.invert) == (0, 0)


@pytest.mark.parametrize("amount", [0, 60, 110])
def test_solarize_add_adds_to_dark_values(amount: int) -> None:
    def expected(image: Image.Image) -> Image.Image:
        return Image.eval(image, lambda value: min(value + amount, 255) if value < 128 else value)

    assert levels(done(PHOTOS, NEAREST, Op.SOLARIZE_ADD, amount), PHOTOS, expected) == (0, 0)


def test_autocontrast_is_pillows_to_a_level() -> None:
    mean, largest = levels(done(LOW_CONTRAST, NEAREST, Op.AUTOCONTRAST), LOW_CONTRAST, ImageOps.autocontrast)
    assert mean < 0.05 and largest <= 1
    flat = [Image.new("RGB", (WIDTH, HEIGHT), (10, 0, 255))]
    assert levels(done(flat, NEAREST, Op.AUTOCONTRAST), flat, ImageOps.autocontrast) == (0, 0)


@pytest.mark.parametrize("images", [PHOTOS, LOW_CONTRAST], ids=["photos", "low contrast"])
def test_equalize_is_near_pillows(images: list[Image.Image]) -> None:
    """DALI's is OpenCV's: both take the share of the pixels below a value, and Pillow a whole step of them a level."""
    mean, largest = levels(done(images, NEAREST, Op.EQUALIZE), images, ImageOps.equalize)
    assert mean < 4.5 and largest <= 8


def moves() -> dict[str, np.ndarray]:
    """Matrices from a place in the result to one in the image."""
    rotation = parameters_of_rotation(30.0)
    return {
        "shear_x": np.array([[1, 0.3, 0], [0, 1, 0]]),
        "shear_y": np.array([[1, 0, 0], [-0.17, 1, 0]]),
        "translate_x": np.array([[1, 0, 40], [0, 1, 0]]),
        "translate_y": np.array([[1, 0, 0], [0, 1, -12.5]]),
        "rotate": rotation,
    }


def parameters_of_rotation(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]])
    centre = np.array([WIDTH / 2, HEIGHT / 2])
    return np.column_stack([linear, centre - linear @ centre])


@pytest.mark.parametrize(
    ("config", "pil_filter", "bound"),
    [(NEAREST, Image.Resampling.NEAREST, 0.1), (LINEAR, Image.Resampling.BILINEAR, 1.0)],
    ids=["nearest", "linear"],
)
@pytest.mark.parametrize("name", moves())
def test_moved_images_are_pillows(config: AugmentConfig, pil_filter: Any, bound: float, name: str) -> None:
    matrix = moves()[name]
    coefficients = matrix.ravel().tolist()

    def expected(image: Image.Image) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, pil_filter, fillcolor=GREY)

    ours = done(PHOTOS, config, Op.GEOMETRIC, matrix=matrix.astype(np.float32))
    assert levels(ours, PHOTOS, expected)[0] < bound


def test_a_rotation_turns_as_pillows_does() -> None:
    ours = done(PHOTOS, LINEAR, Op.GEOMETRIC, matrix=parameters_of_rotation(20.0).astype(np.float32))
    turned = lambda image: image.rotate(20.0, Image.Resampling.BILINEAR, fillcolor=GREY)  # noqa: E731
    assert levels(ours, PHOTOS, turned)[0] < 1.0


def test_cutout_is_a_grey_box() -> None:
    def expected(image: Image.Image) -> Image.Image:
        cut = image.copy()
        ImageDraw.Draw(cut).rectangle((30, 20, 30 + 50 - 1, 20 + 40 - 1), fill=GREY)
        return cut

    assert levels(done(PHOTOS, NEAREST, Op.CUTOUT, box=[20, 30, 40, 50]), PHOTOS, expected) == (0, 0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_near_pillows(sigma: float) -> None:
    """Pillow's is three box filters in place of a Gaussian."""
    ours = done(PHOTOS, THREE, Op.BLUR, sigma)
    mean, largest = levels(ours, PHOTOS, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))
    assert mean < 0.7 and largest <= 12


def test_grey_is_pillows_to_a_level() -> None:
    mean, largest = levels(done(PHOTOS, THREE, Op.COLOUR), PHOTOS, lambda image: image.convert("L").convert("RGB"))
    assert mean < 0.05 and largest <= 1


POLICIES = {
    "randaugment": AugmentConfig(policy="randaugment", num_ops=3, magnitude_std=0.5),
    "timm": AugmentConfig(policy="randaugment", op_set="timm", op_probability=0.5, magnitude_std=0.5),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "three_augment": AugmentConfig(policy="three_augment", color_jitter=0.3),
    "jitter": AugmentConfig(color_jitter=0.4),
}


@pytest.mark.parametrize("name", POLICIES)
def test_an_image_is_augmented_alike_among_any_others(name: str) -> None:
    """Permuting a batch permutes what becomes of it, and layers come one after the other."""
    config = POLICIES[name]
    images = [photo(HEIGHT, WIDTH, seed=seed) for seed in range(40)]
    draws = np.random.default_rng(1).random((40, num_draws_per_image(config)))
    values = op_parameters(draws, config, (HEIGHT, WIDTH))
    together = run(images, values, config)
    order = np.random.default_rng(2).permutation(40)
    permuted = run([images[n] for n in order], {key: value[order] for key, value in values.items()}, config)
    np.testing.assert_array_equal(permuted, together[order])
    one_by_one = images
    for layer in range(values["kind"].shape[1]):
        single = {key: np.zeros_like(value) for key, value in values.items()}
        for key, value in values.items():
            single[key][:, layer] = value[:, layer]
        one_by_one = [Image.fromarray(array) for array in run(one_by_one, single, config)]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in one_by_one]), together)
    changed = [not np.array_equal(ours, np.asarray(image)) for ours, image in zip(together, images, strict=True)]
    assert sum(changed) > 15


def run_erased(images: np.ndarray, box: np.ndarray, window: np.ndarray, config: AugmentConfig) -> np.ndarray:
    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None, enable_conditionals=True)
    def pipeline() -> Any:
        pixels, where, corner = fn.external_source(
            source=lambda n: (images, box, window), num_outputs=3, batch=True, layout=["CHW", "", ""]
        )
        return erased(pixels, {"erase_box": where, "erase_window": corner}, config, images.shape[2:])

    built = pipeline()
    built.build()
    return built.run()[0].as_array()


@pytest.mark.parametrize("random_erasing_with", ["noise", "mean"])
def test_erasing_fills_a_box_and_nothing_else(random_erasing_with: str) -> None:
    config = AugmentConfig(random_erasing_probability=0.5, random_erasing_with=random_erasing_with)
    images = np.random.default_rng(0).standard_normal((4, 3, HEIGHT, WIDTH)).astype(np.float32)
    box = np.array([[10, 20, 30, 40], [0, 0, 0, 0], [0, 0, 95, 127], [90, 120, 6, 8]], np.int32)
    window = np.array([[0, 0], [5, 6], [96, 128], [50, 3]], np.int32)
    expected = images.copy()
    plate = noise_plate((HEIGHT, WIDTH))
    for image, (top, left, height, width), (y, x) in zip(expected, box, window, strict=True):
        noise = plate[:, y : y + HEIGHT, x : x + WIDTH] if random_erasing_with == "noise" else np.zeros_like(image)
        here = np.s_[:, top : top + height, left : left + width]
        image[here] = noise[here]
    np.testing.assert_allclose(run_erased(images, box, window, config), expected, atol=1e-6)


def test_the_noise_is_normal_and_always_the_same() -> None:
    plate = noise_plate((HEIGHT, WIDTH))
    assert plate.shape == (3, 2 * HEIGHT, 2 * WIDTH)
    assert abs(plate.mean()) < 0.02 and abs(plate.std() - 1) < 0.02
    np.testing.assert_array_equal(plate, noise_plate((HEIGHT, WIDTH)))
