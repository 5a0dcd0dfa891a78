"""What the policies draw: how often, how strong, in which direction, against their references' definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vit_static.config.schema import AugmentConfig
from vit_static.data.augment import Op, layer_kinds, num_draws_per_image, op_parameters

NUM_IMAGES = 40_000
SIZE = (224, 224)
RANDAUGMENT = AugmentConfig(policy="randaugment", magnitude=10.0)
TIMM = AugmentConfig(policy="randaugment", op_set="timm", magnitude=9.0, magnitude_std=0.5, op_probability=0.5)
TRIVIAL = AugmentConfig(policy="trivialaugment")
THREE = AugmentConfig(policy="three_augment")


def drawn(config: AugmentConfig, num_images: int = NUM_IMAGES, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0).random((num_images, num_draws_per_image(config)))
    return op_parameters(draws, config, size)


def moves_of(found: dict[str, np.ndarray], layer: int = 0) -> dict[str, np.ndarray]:
    """By the name of a move, how far: shears, translations in pixels, degrees."""
    matrices = found["matrix"][found["kind"][:, layer] == Op.GEOMETRIC, layer].astype(np.float64)
    a, b, c, d, e, f = matrices.reshape(-1, 6).T
    plain = (a == 1) & (e == 1)
    return {
        "shear_x": b[plain & (b != 0)],
        "shear_y": d[plain & (d != 0)],
        "translate_x": c[plain & (b == 0) & (d == 0) & (c != 0)],
        "translate_y": f[plain & (b == 0) & (d == 0) & (f != 0)],
        "rotate": np.degrees(np.arctan2(d[~plain], a[~plain])),
    }


def assert_share(count: int, total: int, share: float) -> None:
    assert abs(count - share * total) < 5 * math.sqrt(total * share * (1 - share)), (count, share * total)


@pytest.mark.parametrize(
    ("config", "num_operations", "of_kind"),
    [
        (RANDAUGMENT, 16, {Op.GEOMETRIC: 5, Op.SOLARIZE: 2}),  # inverting is solarizing from 0 up
        (TIMM.model_copy(update={"op_probability": 1.0}), 15, {Op.GEOMETRIC: 5, Op.SOLARIZE: 2}),
        (TRIVIAL, 14, {Op.GEOMETRIC: 5}),
        (THREE, 3, {}),
    ],
    ids=["google", "timm", "trivialaugment", "three_augment"],
)
def test_operations_are_drawn_alike_often(config: AugmentConfig, num_operations: int, of_kind: dict[int, int]) -> None:
    found = drawn(config)
    for layer, kinds in enumerate(layer_kinds(config)):
        assert set(np.unique(found["kind"][:, layer])) == kinds
        for kind in kinds:
            count = int((found["kind"][:, layer] == kind).sum())
            assert_share(count, NUM_IMAGES, of_kind.get(kind, 1) / num_operations)
    if config.policy != "three_augment":
        for name, far in moves_of(found).items():
            assert_share(len(far), NUM_IMAGES, 1 / num_operations)
            assert_share(int((far > 0).sum()), len(far), 0.5), name


def factors(found: dict[str, np.ndarray], kind: int) -> np.ndarray:
    return found["factor"][found["kind"] == kind]


def test_googles_magnitudes() -> None:
    """At 10 of 10, in an image of 224 pixels, and at 5."""
    full, half = drawn(RANDAUGMENT), drawn(RANDAUGMENT.model_copy(update={"magnitude": 5.0}))
    expected = {
        Op.BRIGHTNESS: (1.9, 1.0), Op.CONTRAST: (1.9, 1.0), Op.COLOUR: (1.9, 1.0), Op.SHARPNESS: (1.9, 1.0),
        Op.POSTERIZE: (4, 2), Op.SOLARIZE_ADD: (110, 55),
    }  # fmt: skip
    for kind, (most, middle) in expected.items():
        np.testing.assert_allclose(np.unique(factors(full, kind)), [most], rtol=1e-6)
        np.testing.assert_allclose(np.unique(factors(half, kind)), [middle], rtol=1e-6)
    assert set(factors(full, Op.SOLARIZE)) == {0, 256} and set(factors(half, Op.SOLARIZE)) == {0, 128}
    for found, share in ((full, 1.0), (half, 0.5)):
        far = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 100, "translate_y": 100, "rotate": 30}
        for name, values in moves_of(found).items():
            np.testing.assert_allclose(np.abs(values), share * far[name], rtol=1e-5)
        boxes = found["box"][found["kind"] == Op.CUTOUT]
        inside = (boxes[:, :2] > 0).all(axis=1) & (boxes[:, :2] + boxes[:, 2:] < 224).all(axis=1)
        assert inside.sum() > 500
        assert (boxes[inside, 2:] == 2 * 40 * share).all()
        assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 224).all()


def test_timms_magnitudes() -> None:
    found = drawn(TIMM.model_copy(update={"magnitude_std": 0.0, "op_probability": 1.0}))
    for kind in (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOUR, Op.SHARPNESS):
        np.testing.assert_allclose(np.unique(factors(found, kind)), [1 - 0.81, 1 + 0.81], rtol=1e-5)
    assert set(factors(found, Op.POSTERIZE)) == {4 - int(0.9 * 4)}
    assert set(factors(found, Op.SOLARIZE)) == {0, 256 - int(0.9 * 256)}
    assert set(factors(found, Op.SOLARIZE_ADD)) == {int(0.9 * 110)}
    for name, most in {"shear_x": 0.3, "translate_y": 0.45 * 224, "rotate": 30}.items():
        np.testing.assert_allclose(np.abs(moves_of(found)[name]), 0.9 * most, rtol=1e-5)


def test_timms_magnitudes_are_normally_distributed_and_half_of_its_operations_left_out() -> None:
    found = drawn(TIMM)
    of_images = np.abs(moves_of(found)["shear_x"]) / 0.3 * 10
    assert abs(np.median(of_images) - 9.0) < 0.05
    below = of_images[of_images < 9.0]
    assert abs(np.sqrt(np.mean((below - 9.0) ** 2)) - 0.5) < 0.04
    assert of_images.max() <= 10.0 + 1e-5
    for layer in range(2):
        assert_share(int((found["kind"][:, layer] == Op.NONE).sum()), NUM_IMAGES, 0.5)


def test_trivialaugments_magnitudes_are_those_of_torchvision() -> None:
    """31 steps, uniformly; its posterization has 8 - round(6 * step / 30) bits."""
    found = drawn(TRIVIAL)
    degrees = np.abs(moves_of(found)["rotate"])
    np.testing.assert_allclose(np.unique(degrees.round(2)), (135 * np.arange(1, 31) / 30).round(2), atol=0.02)
    counts = np.unique(degrees.round(1), return_counts=True)[1]
    assert counts.min() > 50 and counts.max() < 160  # about 92 each
    expected = {int(8 - round(6 * step / 30)) for step in range(31)}
    assert set(factors(found, Op.POSTERIZE)) == expected == {8, 7, 6, 5, 4, 3, 2}
    assert set(factors(found, Op.SOLARIZE)) == {math.ceil(255 - 8.5 * step) for step in range(31)}
    brightness = factors(found, Op.BRIGHTNESS)
    assert brightness.min() == pytest.approx(0.01, abs=1e-6) and brightness.max() == pytest.approx(1.99, abs=1e-6)


def test_three_augment_blurs_by_0_1_to_2_pixels() -> None:
    sigma = factors(drawn(THREE), Op.BLUR)
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) < 0.02
    assert set(factors(drawn(THREE), Op.SOLARIZE)) == {128} and set(factors(drawn(THREE), Op.COLOUR)) == {0}


def test_jitter_changes_each_of_three_once_in_every_order() -> None:
    found = drawn(AugmentConfig(color_jitter=0.3))
    orders, counts = np.unique(found["kind"], axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(
        tuple(order) for order in np.array(np.meshgrid([2, 3, 4], [2, 3, 4], [2, 3, 4])).T.reshape(-1, 3)
        if len(set(order)) == 3
    )  # fmt: skip
    for count in counts:
        assert_share(int(count), NUM_IMAGES, 1 / 6)
    assert 0.7 <= found["factor"].min() < 0.701 and 1.299 < found["factor"].max() <= 1.3
    by_kind = [found["factor"][found["kind"] == kind] for kind in (2, 3, 4)]
    assert all(abs(factor.mean() - 1.0) < 5 * 0.3 / math.sqrt(3 * NUM_IMAGES) for factor in by_kind)
    assert abs(np.corrcoef(by_kind)[0, 1]) < 0.03  # each its own


def test_jitter_comes_after_the_policy() -> None:
    both = drawn(THREE.model_copy(update={"color_jitter": 0.3}), 10)
    assert both["kind"].shape == (10, 4)
    assert set(both["kind"][:, 0]) <= {Op.COLOUR, Op.SOLARIZE, Op.BLUR}


def test_erasing_is_timms() -> None:
    config = AugmentConfig(random_erasing_probability=0.25)
    found = drawn(config, size=(96, 160))
    top, left, height, width = found["erase_box"].T
    erased = height > 0
    # Of the tries, those whose side is longer than the image's don't count; ten of them hardly ever fail.
    assert_share(int(erased.sum()), NUM_IMAGES, 0.25)
    assert (top + height <= 96).all() and (left + width <= 160).all() and (found["erase_box"] >= 0).all()
    areas, aspects = (height * width / (96 * 160))[erased], (height / np.maximum(width, 1))[erased]
    assert areas.min() > 0.018 and areas.max() < 0.35
    assert aspects.min() > 0.27 and aspects.max() < 3.7
    assert abs(np.log(aspects[areas < 0.1]).mean()) < 0.05  # uniform in the logarithm, and small ones always fit
    places = (top / (96 - height))[erased]
    assert abs(places.mean() - 0.5) < 0.02
    window = found["erase_window"]
    assert window.min() == 0 and (window.max(axis=0) == [96, 160]).all()


def test_no_box_is_as_large_as_the_image() -> None:
    config = AugmentConfig(
        random_erasing_probability=1.0, random_erasing_area=(0.9, 1.0), random_erasing_aspect_ratio=(0.3, 3.3)
    )
    box = drawn(config, 2000, (32, 32))["erase_box"]
    assert (box[:, 2:] < 32).all()
    assert (box[:, 2] == 0).any() and (box[:, 2] > 0).any()  # sometimes none of ten fits


@pytest.mark.parametrize(
    "config", [RANDAUGMENT, TIMM, TRIVIAL, THREE, AugmentConfig(color_jitter=0.4, random_erasing_probability=0.5)]
)
def test_an_image_gets_the_same_among_any_others(config: AugmentConfig) -> None:
    draws = np.random.default_rng(0).random((50, num_draws_per_image(config)))
    together = op_parameters(draws, config, SIZE)
    for number in (0, 17, 49):
        alone = op_parameters(draws[number : number + 1], config, SIZE)
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            np.testing.assert_array_equal(value[0], together[name][number])
            assert value.dtype in (np.float32, np.int32)


def test_nothing_configured_draws_nothing() -> None:
    assert num_draws_per_image(AugmentConfig()) == 0
    assert layer_kinds(AugmentConfig()) == []
    for config in (RANDAUGMENT, TRIVIAL, THREE, AugmentConfig(random_erasing_probability=0.1)):
        assert num_draws_per_image(config) % 4 == 0 and num_draws_per_image(config) > 0
