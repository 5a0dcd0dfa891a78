"""Mixup and CutMix: what they draw, what they do to images and targets, and that no rank does it otherwise."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from scipy import stats

from vit_static.config.schema import AugmentConfig
from vit_static.data.mixup import Mix, Mixup, draw_mix, mixed

MIXUP, CUTMIX = AugmentConfig(mixup_alpha=0.8), AugmentConfig(cutmix_alpha=1.0)


def batch(num_images: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((num_images, 3, 12, 16)).astype(np.float32), rng.random((num_images, 5), np.float32)


def mixed_arrays(images: np.ndarray, targets: np.ndarray, mix: Mix) -> tuple[np.ndarray, np.ndarray]:
    found = mixed(paddle.to_tensor(images), paddle.to_tensor(targets), mix)
    return found[0].numpy(), found[1].numpy()


def test_mixup_adds_shares_of_two_neighbours() -> None:
    images, targets = batch()
    partners = [1, 0, 3, 2, 5, 4]
    new_images, new_targets = mixed_arrays(images, targets, Mix(0.7))
    np.testing.assert_allclose(new_images, 0.7 * images + 0.3 * images[partners], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(new_targets, 0.7 * targets + 0.3 * targets[partners], rtol=1e-6, atol=1e-6)


def test_cutmix_cuts_a_box_out_of_the_neighbour() -> None:
    images, targets = batch()
    partners = [1, 0, 3, 2, 5, 4]
    share = 1 - 3 * 10 / (12 * 16)
    new_images, new_targets = mixed_arrays(images, targets, Mix(share, (2, 5, 6, 16)))
    expected = images.copy()
    expected[:, :, 2:5, 6:16] = images[partners][:, :, 2:5, 6:16]
    np.testing.assert_array_equal(new_images, expected)
    np.testing.assert_allclose(new_targets, share * targets + (1 - share) * targets[partners], rtol=1e-6)


@pytest.mark.parametrize("dp_size", [2, 3])
@pytest.mark.parametrize("augment", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_ranks_together_mix_as_one_does(augment: AugmentConfig, dp_size: int) -> None:
    images, targets = batch(12)
    mix = draw_mix(augment, (12, 16), seed=3, step=5)
    assert mix.share < 1
    whole = mixed_arrays(images, targets, mix)
    parts = [
        mixed_arrays(*part, mix) for part in zip(np.split(images, dp_size), np.split(targets, dp_size), strict=True)
    ]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(several))


def drawn(augment: AugmentConfig, count: int = 2000, image_size: tuple[int, int] = (224, 224)) -> list[Mix]:
    return [draw_mix(augment, image_size, seed=1, step=step) for step in range(count)]


def test_mixups_shares_are_beta_distributed() -> None:
    shares = [mix.share for mix in drawn(MIXUP)]
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 0.001
    assert all(mix.box is None for mix in drawn(MIXUP, 50))


def test_cutmixs_boxes_are_those_of_its_paper() -> None:
    """A side of sqrt(1 - share) of the image's, a centre uniform over it, cut off at its borders."""
    boxes = np.array([mix.box for mix in drawn(CUTMIX, image_size=(224, 160))])
    top, bottom, left, right = boxes.T
    assert (boxes >= 0).all() and (bottom <= 224).all() and (right <= 160).all()
    inside = (top > 0) & (bottom < 224) & (left > 0) & (right < 160)
    heights, widths = bottom - top, right - left
    np.testing.assert_allclose(heights[inside] / 224, widths[inside] / 160, atol=0.02)
    for mix in drawn(CUTMIX, 100, (224, 160)):
        assert mix.box is not None
        y0, y1, x0, x1 = mix.box
        assert mix.share == 1 - (y1 - y0) * (x1 - x0) / (224 * 160)
    # Beta(1, 1) is uniform. A box whose side is a share s of the image's leaves, along an axis, on average
    # s - s^2 / 4 of it in the image: so E[area] = E[(s - s^2/4)^2] with s = sqrt(u), by integration 121/480.
    area = (heights * widths / (224 * 160)).mean()
    expected = 0.5 - 2 / 5 * 0.5 + 1 / 16 / 3
    assert abs(area - expected) < 5 * 0.25 / np.sqrt(2000) + 0.005


def test_one_of_the_two_is_chosen_as_often_as_asked_for() -> None:
    both = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.6, mixup_switch_prob=0.3)
    mixes = drawn(both, 3000)
    unmixed = np.mean([mix.share == 1.0 and mix.box is None for mix in mixes])
    cut = np.mean([mix.box is not None for mix in mixes])
    assert abs(unmixed - 0.4) < 5 * np.sqrt(0.24 / 3000)
    assert abs(cut - 0.18) < 5 * np.sqrt(0.18 * 0.82 / 3000)


def test_a_steps_mixing_is_a_function_of_the_seed_and_the_step() -> None:
    assert draw_mix(CUTMIX, (32, 32), 7, 11) == draw_mix(CUTMIX, (32, 32), 7, 11)
    assert draw_mix(CUTMIX, (32, 32), 7, 11) != draw_mix(CUTMIX, (32, 32), 7, 12)
    assert draw_mix(CUTMIX, (32, 32), 7, 11) != draw_mix(CUTMIX, (32, 32), 8, 11)


def test_labels_become_targets_only_where_something_is_mixed() -> None:
    images, _ = batch(4)
    labels = paddle.to_tensor([1, 0, 4, 4])
    as_they_were = Mixup(AugmentConfig(), 5, 0)((paddle.to_tensor(images), labels), 0)
    assert as_they_were[1] is labels
    _, targets = Mixup(MIXUP, 5, 0)((paddle.to_tensor(images), labels), 0)
    share = draw_mix(MIXUP, (12, 16), 0, 0).share
    expected = np.array([[1 - share, share, 0, 0, 0], [share, 1 - share, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]])
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)
    several = paddle.to_tensor(np.eye(5, dtype=np.uint8)[[0, 1, 2, 3]])
    _, targets = Mixup(MIXUP, 5, 0)((paddle.to_tensor(images), several), 0)
    assert targets.dtype == paddle.float32
    np.testing.assert_allclose(targets.numpy().sum(axis=1), 1, atol=1e-6)
