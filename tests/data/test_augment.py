"""Random augmentation parameters against the definitions of the references: frequencies, strengths, directions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vit_static.config.data_schema import AugmentConfig
from vit_static.data.augment import Op, num_draws_per_image, op_parameters, ops_per_layer

NUM_IMAGES = 40_000
SIZE = (224, 224)
RANDAUGMENT = AugmentConfig(policy="randaugment", magnitude=10.0)
TIMM = AugmentConfig(policy="randaugment", op_set="timm", magnitude=9.0, magnitude_std=0.5, op_probability=0.5)
TRIVIAL = AugmentConfig(policy="trivialaugment")
THREE = AugmentConfig(policy="three_augment")


def random_parameters(
    config: AugmentConfig, num_images: int = NUM_IMAGES, size: tuple[int, int] = SIZE
) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0).random((num_images, num_draws_per_image(config)))
    return op_parameters(draws, config, size)


def geometric_factors(parameters: dict[str, np.ndarray], layer: int = 0) -> dict[str, np.ndarray]:
    """Return shears, translations in pixels and degrees by the name of the operation."""
    matrices = parameters["matrix"][parameters["op"][:, layer] == Op.GEOMETRIC, layer].astype(np.float64)
    a, b, c, d, e, f = matrices.reshape(-1, 6).T
    not_rotated = (a == 1) & (e == 1)
    return {
        "shear_x": b[not_rotated & (b != 0)],
        "shear_y": d[not_rotated & (d != 0)],
        "translate_x": c[not_rotated & (b == 0) & (d == 0) & (c != 0)],
        "translate_y": f[not_rotated & (b == 0) & (d == 0) & (f != 0)],
        "rotate": np.degrees(np.arctan2(d[~not_rotated], a[~not_rotated])),
    }


def assert_share(count: int, total: int, share: float) -> None:
    assert abs(count - share * total) < 5 * math.sqrt(total * share * (1 - share)), (count, share * total)


@pytest.mark.parametrize(
    ("config", "num_ops", "num_ops_by_op"),
    [
        (RANDAUGMENT, 16, {Op.GEOMETRIC: 5, Op.SOLARIZE: 2}),  # inverting is solarizing with threshold 0
        (TIMM.model_copy(update={"op_probability": 1.0}), 15, {Op.GEOMETRIC: 5, Op.SOLARIZE: 2}),
        (TRIVIAL, 14, {Op.GEOMETRIC: 5}),
        (THREE, 3, {}),
    ],
    ids=["google", "timm", "trivialaugment", "three_augment"],
)
def test_operations_are_equally_frequent(config: AugmentConfig, num_ops: int, num_ops_by_op: dict[int, int]) -> None:
    parameters = random_parameters(config)
    for layer, ops in enumerate(ops_per_layer(config)):
        assert set(np.unique(parameters["op"][:, layer])) == ops
        for op in ops:
            count = int((parameters["op"][:, layer] == op).sum())
            assert_share(count, NUM_IMAGES, num_ops_by_op.get(op, 1) / num_ops)
    if config.policy != "three_augment":
        for values in geometric_factors(parameters).values():
            assert_share(len(values), NUM_IMAGES, 1 / num_ops)
            assert_share(int((values > 0).sum()), len(values), 0.5)


def factors(parameters: dict[str, np.ndarray], op: int) -> np.ndarray:
    return parameters["factor"][parameters["op"] == op]


def test_google_magnitudes() -> None:
    """At magnitudes 10 and 5 of 10, in an image of 224 pixels."""
    full, half = random_parameters(RANDAUGMENT), random_parameters(RANDAUGMENT.model_copy(update={"magnitude": 5.0}))
    expected = {
        Op.BRIGHTNESS: (1.9, 1.0), Op.CONTRAST: (1.9, 1.0), Op.COLOUR: (1.9, 1.0), Op.SHARPNESS: (1.9, 1.0),
        Op.POSTERIZE: (4, 2), Op.SOLARIZE_ADD: (110, 55),
    }  # fmt: skip
    for op, (at_10, at_5) in expected.items():
        np.testing.assert_allclose(np.unique(factors(full, op)), [at_10], rtol=1e-6)
        np.testing.assert_allclose(np.unique(factors(half, op)), [at_5], rtol=1e-6)
    assert set(factors(full, Op.SOLARIZE)) == {0, 256} and set(factors(half, Op.SOLARIZE)) == {0, 128}
    for parameters, share in ((full, 1.0), (half, 0.5)):
        max_factors = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 100, "translate_y": 100, "rotate": 30}
        for name, values in geometric_factors(parameters).items():
            np.testing.assert_allclose(np.abs(values), share * max_factors[name], rtol=1e-5)
        boxes = parameters["box"][parameters["op"] == Op.CUTOUT]
        inside = (boxes[:, :2] > 0).all(axis=1) & (boxes[:, :2] + boxes[:, 2:] < 224).all(axis=1)
        assert inside.sum() > 500
        assert (boxes[inside, 2:] == 2 * 40 * share).all()
        assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 224).all()


def test_timm_magnitudes() -> None:
    parameters = random_parameters(TIMM.model_copy(update={"magnitude_std": 0.0, "op_probability": 1.0}))
    for op in (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOUR, Op.SHARPNESS):
        np.testing.assert_allclose(np.unique(factors(parameters, op)), [1 - 0.81, 1 + 0.81], rtol=1e-5)
    assert set(factors(parameters, Op.POSTERIZE)) == {4 - int(0.9 * 4)}
    assert set(factors(parameters, Op.SOLARIZE)) == {0, 256 - int(0.9 * 256)}
    assert set(factors(parameters, Op.SOLARIZE_ADD)) == {int(0.9 * 110)}
    for name, max_factor in {"shear_x": 0.3, "translate_y": 0.45 * 224, "rotate": 30}.items():
        np.testing.assert_allclose(np.abs(geometric_factors(parameters)[name]), 0.9 * max_factor, rtol=1e-5)


def test_timm_magnitudes_are_normal_and_half_of_the_operations_are_skipped() -> None:
    parameters = random_parameters(TIMM)
    magnitudes = np.abs(geometric_factors(parameters)["shear_x"]) / 0.3 * 10
    assert abs(np.median(magnitudes) - 9.0) < 0.05
    below = magnitudes[magnitudes < 9.0]
    assert abs(np.sqrt(np.mean((below - 9.0) ** 2)) - 0.5) < 0.04
    assert magnitudes.max() <= 10.0 + 1e-5
    for layer in range(2):
        assert_share(int((parameters["op"][:, layer] == Op.NONE).sum()), NUM_IMAGES, 0.5)


def test_trivialaugment_magnitudes_are_torchvisions() -> None:
    """Uniform over 31 steps; posterize keeps 8 - round(6 * step / 30) bits."""
    parameters = random_parameters(TRIVIAL)
    degrees = np.abs(geometric_factors(parameters)["rotate"])
    np.testing.assert_allclose(np.unique(degrees.round(2)), (135 * np.arange(1, 31) / 30).round(2), atol=0.02)
    counts = np.unique(degrees.round(1), return_counts=True)[1]
    assert counts.min() > 50 and counts.max() < 160  # about 92 per step
    expected = {int(8 - round(6 * step / 30)) for step in range(31)}
    assert set(factors(parameters, Op.POSTERIZE)) == expected == {8, 7, 6, 5, 4, 3, 2}
    assert set(factors(parameters, Op.SOLARIZE)) == {math.ceil(255 - 8.5 * step) for step in range(31)}
    brightness = factors(parameters, Op.BRIGHTNESS)
    assert brightness.min() == pytest.approx(0.01, abs=1e-6) and brightness.max() == pytest.approx(1.99, abs=1e-6)


def test_three_augment_sigma_is_0_1_to_2_pixels() -> None:
    sigma = factors(random_parameters(THREE), Op.BLUR)
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) < 0.02
    assert set(factors(random_parameters(THREE), Op.SOLARIZE)) == {128} and set(
        factors(random_parameters(THREE), Op.COLOUR)
    ) == {0}


def test_jitter_applies_three_operations_in_every_order() -> None:
    parameters = random_parameters(AugmentConfig(color_jitter=0.3))
    orders, counts = np.unique(parameters["op"], axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(
        tuple(order) for order in np.array(np.meshgrid([2, 3, 4], [2, 3, 4], [2, 3, 4])).T.reshape(-1, 3)
        if len(set(order)) == 3
    )  # fmt: skip
    for count in counts:
        assert_share(int(count), NUM_IMAGES, 1 / 6)
    assert 0.7 <= parameters["factor"].min() < 0.701 and 1.299 < parameters["factor"].max() <= 1.3
    factors_by_op = [parameters["factor"][parameters["op"] == op] for op in (2, 3, 4)]
    assert all(abs(factor.mean() - 1.0) < 5 * 0.3 / math.sqrt(3 * NUM_IMAGES) for factor in factors_by_op)
    assert abs(np.corrcoef(factors_by_op)[0, 1]) < 0.03  # independent of each other


def test_jitter_comes_after_the_policy() -> None:
    parameters = random_parameters(THREE.model_copy(update={"color_jitter": 0.3}), 10)
    assert parameters["op"].shape == (10, 4)
    assert set(parameters["op"][:, 0]) <= {Op.COLOUR, Op.SOLARIZE, Op.BLUR}


def test_random_erasing_is_timms() -> None:
    config = AugmentConfig(random_erasing_probability=0.25)
    parameters = random_parameters(config, size=(96, 160))
    top, left, height, width = parameters["erasing_box"].T
    is_erased = height > 0
    # Attempts with a side longer than the image's don't count; all ten hardly ever fail.
    assert_share(int(is_erased.sum()), NUM_IMAGES, 0.25)
    assert (top + height <= 96).all() and (left + width <= 160).all() and (parameters["erasing_box"] >= 0).all()
    areas, aspects = (height * width / (96 * 160))[is_erased], (height / np.maximum(width, 1))[is_erased]
    assert areas.min() > 0.018 and areas.max() < 0.35
    assert aspects.min() > 0.27 and aspects.max() < 3.7
    assert abs(np.log(aspects[areas < 0.1]).mean()) < 0.05  # uniform in the logarithm; small boxes always fit
    positions = (top / (96 - height))[is_erased]
    assert abs(positions.mean() - 0.5) < 0.02
    corner = parameters["erasing_noise_corner"]
    assert corner.min() == 0 and (corner.max(axis=0) == [96, 160]).all()


def test_an_erasing_box_is_smaller_than_the_image() -> None:
    config = AugmentConfig(
        random_erasing_probability=1.0, random_erasing_area=(0.9, 1.0), random_erasing_aspect_ratio=(0.3, 3.3)
    )
    box = random_parameters(config, 2000, (32, 32))["erasing_box"]
    assert (box[:, 2:] < 32).all()
    assert (box[:, 2] == 0).any() and (box[:, 2] > 0).any()  # sometimes none of the ten fits


@pytest.mark.parametrize(
    "config", [RANDAUGMENT, TIMM, TRIVIAL, THREE, AugmentConfig(color_jitter=0.4, random_erasing_probability=0.5)]
)
def test_parameters_dont_depend_on_the_rest_of_the_batch(config: AugmentConfig) -> None:
    draws = np.random.default_rng(0).random((50, num_draws_per_image(config)))
    batch = op_parameters(draws, config, SIZE)
    for number in (0, 17, 49):
        alone = op_parameters(draws[number : number + 1], config, SIZE)
        assert alone.keys() == batch.keys()
        for name, value in alone.items():
            np.testing.assert_array_equal(value[0], batch[name][number])
            assert value.dtype in (np.float32, np.int32)


def test_no_augmentation_needs_no_draws() -> None:
    assert num_draws_per_image(AugmentConfig()) == 0
    assert ops_per_layer(AugmentConfig()) == []
    for config in (RANDAUGMENT, TRIVIAL, THREE, AugmentConfig(random_erasing_probability=0.1)):
        assert num_draws_per_image(config) % 4 == 0 and num_draws_per_image(config) > 0
