"""Mixup and CutMix: random parameters, images and targets, and independence of the number of ranks."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from scipy import stats

from vit_static.config.data_schema import AugmentConfig
from vit_static.data.mixup import MixParams, Mixup, draw_mix_params, mix

MIXUP, CUTMIX = AugmentConfig(mixup_alpha=0.8), AugmentConfig(cutmix_alpha=1.0)


def batch(num_images: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((num_images, 3, 12, 16)).astype(np.float32), rng.random((num_images, 5), np.float32)


def mix_arrays(images: np.ndarray, targets: np.ndarray, params: MixParams) -> tuple[np.ndarray, np.ndarray]:
    mixed_images, mixed_targets = mix(paddle.to_tensor(images), paddle.to_tensor(targets), params)
    return mixed_images.numpy(), mixed_targets.numpy()


def test_mixup_blends_two_neighbours() -> None:
    images, targets = batch()
    partners = [1, 0, 3, 2, 5, 4]
    new_images, new_targets = mix_arrays(images, targets, MixParams(0.7))
    np.testing.assert_allclose(new_images, 0.7 * images + 0.3 * images[partners], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(new_targets, 0.7 * targets + 0.3 * targets[partners], rtol=1e-6, atol=1e-6)


def test_cutmix_pastes_a_box_of_the_neighbour() -> None:
    images, targets = batch()
    partners = [1, 0, 3, 2, 5, 4]
    share = 1 - 3 * 10 / (12 * 16)
    new_images, new_targets = mix_arrays(images, targets, MixParams(share, (2, 5, 6, 16)))
    expected = images.copy()
    expected[:, :, 2:5, 6:16] = images[partners][:, :, 2:5, 6:16]
    np.testing.assert_array_equal(new_images, expected)
    np.testing.assert_allclose(new_targets, share * targets + (1 - share) * targets[partners], rtol=1e-6)


@pytest.mark.parametrize("dp_size", [2, 3])
@pytest.mark.parametrize("augment", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_ranks_mix_as_a_single_process_does(augment: AugmentConfig, dp_size: int) -> None:
    images, targets = batch(12)
    params = draw_mix_params(augment, (12, 16), seed=3, step=5)
    assert params.share < 1
    expected = mix_arrays(images, targets, params)
    parts = [
        mix_arrays(*part, params) for part in zip(np.split(images, dp_size), np.split(targets, dp_size), strict=True)
    ]
    for array, rank_arrays in zip(expected, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(rank_arrays))


def draw_many(augment: AugmentConfig, count: int = 2000, image_size: tuple[int, int] = (224, 224)) -> list[MixParams]:
    return [draw_mix_params(augment, image_size, seed=1, step=step) for step in range(count)]


def test_mixup_shares_are_beta_distributed() -> None:
    shares = [params.share for params in draw_many(MIXUP)]
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 0.001
    assert all(params.box is None for params in draw_many(MIXUP, 50))


def test_cutmix_boxes_are_those_of_its_paper() -> None:
    """The side is sqrt(1 - share) of the image's, the centre is uniform, and the box is clipped at the borders."""
    boxes = np.array([params.box for params in draw_many(CUTMIX, image_size=(224, 160))])
    top, bottom, left, right = boxes.T
    assert (boxes >= 0).all() and (bottom <= 224).all() and (right <= 160).all()
    inside = (top > 0) & (bottom < 224) & (left > 0) & (right < 160)
    heights, widths = bottom - top, right - left
    np.testing.assert_allclose(heights[inside] / 224, widths[inside] / 160, atol=0.02)
    for params in draw_many(CUTMIX, 100, (224, 160)):
        assert params.box is not None
        y0, y1, x0, x1 = params.box
        assert params.share == 1 - (y1 - y0) * (x1 - x0) / (224 * 160)
    # Beta(1, 1) is uniform. If a box's side is a share s of the image's, then on average s - s^2 / 4 of the axis is
    # inside the image. So E[area] = E[(s - s^2/4)^2] with s = sqrt(u), which is 121/480 by integration.
    area = (heights * widths / (224 * 160)).mean()
    expected = 0.5 - 2 / 5 * 0.5 + 1 / 16 / 3
    assert abs(area - expected) < 5 * 0.25 / np.sqrt(2000) + 0.005


def test_mixup_and_cutmix_have_the_configured_probabilities() -> None:
    both = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.6, mixup_switch_prob=0.3)
    drawn = draw_many(both, 3000)
    share_unmixed = np.mean([params.share == 1.0 and params.box is None for params in drawn])
    share_cutmix = np.mean([params.box is not None for params in drawn])
    assert abs(share_unmixed - 0.4) < 5 * np.sqrt(0.24 / 3000)
    assert abs(share_cutmix - 0.18) < 5 * np.sqrt(0.18 * 0.82 / 3000)


def test_parameters_depend_only_on_the_seed_and_the_step() -> None:
    assert draw_mix_params(CUTMIX, (32, 32), 7, 11) == draw_mix_params(CUTMIX, (32, 32), 7, 11)
    assert draw_mix_params(CUTMIX, (32, 32), 7, 11) != draw_mix_params(CUTMIX, (32, 32), 7, 12)
    assert draw_mix_params(CUTMIX, (32, 32), 7, 11) != draw_mix_params(CUTMIX, (32, 32), 8, 11)


def test_labels_become_targets_only_with_mixup_or_cutmix() -> None:
    images, _ = batch(4)
    labels = paddle.to_tensor([1, 0, 4, 4])
    unchanged = Mixup(AugmentConfig(), 5, 0)((paddle.to_tensor(images), labels), 0)
    assert unchanged[1] is labels
    _, targets = Mixup(MIXUP, 5, 0)((paddle.to_tensor(images), labels), 0)
    share = draw_mix_params(MIXUP, (12, 16), 0, 0).share
    expected = np.array([[1 - share, share, 0, 0, 0], [share, 1 - share, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]])
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)
    multi_hot = paddle.to_tensor(np.eye(5, dtype=np.uint8)[[0, 1, 2, 3]])
    _, targets = Mixup(MIXUP, 5, 0)((paddle.to_tensor(images), multi_hot), 0)
    assert targets.dtype == paddle.float32
    np.testing.assert_allclose(targets.numpy().sum(axis=1), 1, atol=1e-6)
