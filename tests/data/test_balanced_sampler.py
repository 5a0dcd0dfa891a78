"""The order of the balanced sampler, and its use by the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import shards
from vit_static.config.data_schema import AugmentConfig, DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.list_file import Labels
from vit_static.data.loader import TrainLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import BalancedSampler, ShuffledSampler

CLASS_SIZES = [1, 40, 7, 0, 100, 2]  # class 3 has no image
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(6), CLASS_SIZES)).astype(np.int32)
NUM_CLASSES = 5


def labels_of(images: np.ndarray) -> np.ndarray:
    return LABELS[images]


def sampler(seed: int = 3, **changed: Any) -> BalancedSampler:
    return BalancedSampler(Labels(LABELS), seed, **changed)


def test_every_round_has_each_class_once() -> None:
    rounds = labels_of(sampler().indices(0, 1000 * NUM_CLASSES)).reshape(1000, NUM_CLASSES)
    assert (np.sort(rounds, axis=1) == [0, 1, 2, 4, 5]).all()
    orders = np.unique(rounds, axis=0, return_counts=True)[1]
    assert len(orders) == 120  # all orders of five classes
    assert np.abs(orders - 1000 / 120).max() < 5 * np.sqrt(1000 / 120)


def test_a_class_walks_through_all_of_its_images_before_it_repeats_one() -> None:
    indices = sampler().indices(0, 400 * NUM_CLASSES)
    for label, size in enumerate(CLASS_SIZES):
        drawn = indices[labels_of(indices) == label]
        if size == 0:
            continue
        shuffles = drawn[: 400 // size * size].reshape(-1, size)
        assert (np.sort(shuffles, axis=1) == np.flatnonzero(label == LABELS)).all()
        assert size < 3 or len(np.unique(shuffles, axis=0)) == len(shuffles)


def test_the_order_is_a_function_of_seed_and_position() -> None:
    """In any chunks, in any order, and far from the start."""
    indices = sampler().indices(0, 600)
    other = sampler()
    for start in (300, 0, 7, 299, 120):
        np.testing.assert_array_equal(other.indices(start, start + 30), indices[start : start + 30])
    assert not np.array_equal(sampler(seed=4).indices(0, 600), indices)
    far = 10**12
    np.testing.assert_array_equal(sampler().indices(far, far + 20)[10:], sampler().indices(far + 10, far + 20))


def test_augmentations_are_those_of_the_position() -> None:
    shuffled = ShuffledSampler(len(LABELS), seed=3)
    np.testing.assert_array_equal(sampler().crop_flip_draws(40, 50), shuffled.crop_flip_draws(40, 50))
    assert sampler().num_images == len(LABELS)  # an epoch has as many positions


@pytest.mark.parametrize("repeated_aug", [2, 3])
def test_repeated_augmentation_repeats_the_images_of_the_order(repeated_aug: int) -> None:
    once = sampler().indices(0, 200)
    repeated = sampler(repeated_aug=repeated_aug).indices(0, 200 * repeated_aug)
    expected = once.reshape(100, 1, 2).repeat(repeated_aug, axis=1).ravel()  # a b a b c d c d
    np.testing.assert_array_equal(repeated, expected)
    counts = np.bincount(labels_of(repeated), minlength=6)
    assert counts[counts > 0].tolist() == [40 * repeated_aug] * NUM_CLASSES


def test_an_image_belongs_to_each_of_its_classes_and_images_without_labels_are_a_class() -> None:
    """Images 0 to 5 have the labels {0}, {0, 1}, {}, {0}, {}, {2}."""
    labels = Labels(np.array([0, 0, 1, 0, 2], np.int32), np.array([0, 1, 3, 3, 4, 4, 5]))
    indices = BalancedSampler(labels, seed=0).indices(0, 4 * 600)
    for images in indices.reshape(600, 4):
        assert {2, 4} & set(images) and 5 in images
    counts = np.bincount(indices, minlength=6)
    assert counts.tolist() == [200, 800, 300, 200, 300, 600]  # image 1 is a third of class 0, and all of class 1


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen images of three classes of 2, 10 and 1."""
    root = tmp_path_factory.mktemp("unbalanced")
    for number, label in enumerate("abbbbbbbbbbac"):
        (root / "train" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 7, 9)).save(root / "train" / label / f"{number:02d}.png")
    return root


def batches(images: ImageDataset, num_batches: int, start_step: int = 0, rank: int = 0, num_ranks: int = 1) -> list:
    """Return (images, labels) of batches of 6 over all ranks."""
    loader = TrainLoader(
        images,
        (8, 8),
        DataConfig(global_batch_size=6, num_threads=1, sampler="balanced"),
        AugmentConfig(),
        seed=9,
        start_step=start_step,
        dp_rank=rank,
        dp_size=num_ranks,
        device_id=None,
    )
    return [tuple(value.numpy().copy() for value in next(loader)) for _ in range(num_batches)]


def test_batches_are_balanced_on_any_number_of_ranks_and_after_a_resume(unbalanced: Path) -> None:
    images = open_set(DataConfig(root=str(unbalanced)), "train", 3)
    expected = batches(images, 6)
    for _, labels in expected:
        assert np.bincount(labels).tolist() == [2, 2, 2]
    ranks = [batches(images, 3, start_step=3, rank=rank, num_ranks=2) for rank in range(2)]
    for step in range(3):
        for part in range(2):
            both = np.concatenate([ranks[rank][step][part] for rank in range(2)])
            np.testing.assert_array_equal(both, expected[3 + step][part])


def test_shards_know_their_labels(unbalanced: Path, tmp_path: Path) -> None:
    assert shards.main(["--root", str(unbalanced), "--out", str(tmp_path), "--shard-mb", "0.005"]) == 0
    images = open_set(DataConfig(root=str(tmp_path)), "train", 3)
    assert len(list(tmp_path.glob("train/*.tar"))) > 1
    labels = images.labels()
    assert labels.offsets is None
    assert labels.values.tolist() == [images.read(index)[1].item() for index in range(13)]
    assert np.bincount(batches(images, 1)[0][1]).tolist() == [2, 2, 2]
