"""The order of the training images and the random numbers that go with them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_static.config.data_schema import AugmentConfig, DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.loader import TrainLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import NUM_CROP_FLIP_DRAWS, ShuffledSampler


def in_chunks(read, stop: int, size: int) -> np.ndarray:
    """Return read(0, stop), read in chunks."""
    return np.concatenate([read(start, min(start + size, stop)) for start in range(0, stop, size)])


@pytest.mark.parametrize("num_images", [1, 2, 13, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 250])
def test_an_epoch_has_every_image_exactly_once(num_images: int, batch_size: int) -> None:
    """With batches that end inside an epoch, that go beyond its end, and that are longer than an epoch."""
    indices = in_chunks(ShuffledSampler(num_images, seed=3).indices, 4 * num_images, batch_size)
    for epoch in indices.reshape(4, num_images):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_images))


def test_epochs_differ_and_none_is_unshuffled() -> None:
    epochs = ShuffledSampler(100, seed=0).indices(0, 500).reshape(5, 100)
    assert len({tuple(epoch) for epoch in [*epochs, np.arange(100)]}) == 6


def test_neighbours_in_the_dataset_are_rarely_neighbours_in_the_order() -> None:
    """2 of the 999 pairs in a shuffle are neighbours on average."""
    distances = np.abs(np.diff(ShuffledSampler(1000, seed=0).indices(0, 1000)))
    assert (distances == 1).sum() < 12
    assert 300 < distances.mean() < 367  # 1000 / 3


def test_order_and_draws_depend_on_the_seed() -> None:
    def values(seed: int) -> tuple[list[int], list[float]]:
        sampler = ShuffledSampler(100, seed)
        return sampler.indices(0, 100).tolist(), sampler.crop_flip_draws(0, 4).ravel().tolist()

    assert values(5) == values(5)
    assert values(5)[0] != values(6)[0]
    assert values(5)[1] != values(6)[1]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_order_doesnt_depend_on_the_chunks_it_is_read_in(size: int) -> None:
    sampler = ShuffledSampler(13, seed=1)
    chunked = ShuffledSampler(13, seed=1)
    np.testing.assert_array_equal(in_chunks(chunked.indices, 200, size), sampler.indices(0, 200))
    np.testing.assert_array_equal(in_chunks(chunked.crop_flip_draws, 200, size), sampler.crop_flip_draws(0, 200))


def test_positions_can_be_read_in_any_order() -> None:
    sampler = ShuffledSampler(13, seed=1)
    indices, draws = sampler.indices(0, 200), sampler.crop_flip_draws(0, 200)
    for start in (150, 0, 37, 12, 13, 150):
        np.testing.assert_array_equal(sampler.indices(start, start + 30), indices[start : start + 30])
        np.testing.assert_array_equal(sampler.crop_flip_draws(start, start + 30), draws[start : start + 30])


def test_a_position_of_a_trillion_takes_no_time() -> None:
    started = time.perf_counter()
    sampler = ShuffledSampler(1000, seed=1)
    indices, draws = sampler.indices(10**12, 10**12 + 2000), sampler.crop_flip_draws(10**12, 10**12 + 64)
    assert time.perf_counter() - started < 1
    np.testing.assert_array_equal(np.sort(indices.reshape(2, 1000)), [np.arange(1000)] * 2)
    np.testing.assert_array_equal(draws[10:20], sampler.crop_flip_draws(10**12 + 10, 10**12 + 20))
    assert not np.array_equal(draws, sampler.crop_flip_draws(0, 64))


def test_draws_are_uniform_and_differ_by_position_and_by_column() -> None:
    draws = ShuffledSampler(7, seed=2).crop_flip_draws(0, 10_000)
    assert draws.shape == (10_000, NUM_CROP_FLIP_DRAWS)
    assert draws.dtype == np.float32
    assert draws.min() >= 0 and draws.max() < 1
    assert len(np.unique(draws, axis=0)) == 10_000  # the 7 images have other draws each epoch
    # Five standard deviations of a bin's count (n = 10,000) and of a mean
    for column in draws.T:
        counts = np.histogram(column, bins=10, range=(0, 1))[0]
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(900)
        assert abs(column.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 10_000)
    between_columns = np.corrcoef(draws.T) - np.eye(NUM_CROP_FLIP_DRAWS)
    assert np.abs(between_columns).max() < 0.05
    between_neighbours = np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]
    assert abs(between_neighbours) < 0.01


def test_no_draw_is_rounded_up_to_1() -> None:
    """In float64 this draw is above 1 - 2**-25, which float32 rounds to 1: one of 30 million, 275 in a run."""
    assert ShuffledSampler(1, seed=2).crop_flip_draws(1_416_165, 1_416_166).max() < 1


@pytest.mark.parametrize("num_images", [6, 13, 100])
@pytest.mark.parametrize("repeated_aug", [2, 3])
def test_repeated_images_are_close_together(num_images: int, repeated_aug: int) -> None:
    repeated = ShuffledSampler(num_images, seed=3, repeated_aug=repeated_aug).indices(0, 4 * num_images)
    once = ShuffledSampler(num_images, seed=3).indices(0, 4 * num_images)
    for epoch, shuffle in zip(repeated.reshape(4, num_images), once.reshape(4, num_images), strict=True):
        images, counts = np.unique(epoch, return_counts=True)
        assert counts.max() == repeated_aug
        assert (counts < repeated_aug).sum() <= 2  # at the end of the epoch
        assert set(images) == set(shuffle[: len(images)])
        for image in images:
            positions = np.flatnonzero(epoch == image)
            assert positions[-1] - positions[0] <= 2 * (repeated_aug - 1)
        assert (epoch[1:] != epoch[:-1]).all()  # mixup mixes neighbours


def test_repeated_aug_of_1_is_the_usual_order() -> None:
    np.testing.assert_array_equal(
        ShuffledSampler(13, seed=3, repeated_aug=1).indices(0, 50), ShuffledSampler(13, seed=3).indices(0, 50)
    )


def test_augmentations_have_their_own_draws() -> None:
    sampler = ShuffledSampler(7, seed=2)
    draws = sampler.augmentation_draws(0, 50, 24)
    assert not np.isin(draws, sampler.crop_flip_draws(0, 50)).any()
    np.testing.assert_array_equal(sampler.augmentation_draws(20, 30, 24), draws[20:30])
    assert len(np.unique(sampler.augmentation_draws(0, 1000, 12), axis=0)) == 1000


@pytest.fixture(scope="module")
def numbered_images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Ten images, each with its own class, so that labels identify images."""
    root = tmp_path_factory.mktemp("numbered")
    for number in range(10):
        (root / "train" / str(number)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, number, number)).save(root / "train" / str(number) / "image.png")
    return open_set(DataConfig(root=str(root)), "train", 10)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_batches_of_all_ranks_make_up_the_global_batch(numbered_images: ImageDataset, dp_size: int) -> None:
    """Batches of 8 with 10 images, from the fourth step on."""
    loaders = [
        TrainLoader(
            numbered_images,
            (8, 8),
            DataConfig(global_batch_size=8, num_threads=1),
            AugmentConfig(),
            seed=9,
            start_step=3,
            dp_rank=rank,
            dp_size=dp_size,
            device_id=None,
        )
        for rank in range(dp_size)
    ]
    indices = ShuffledSampler(10, seed=9).indices(0, 8 * 7)
    for step in range(3, 7):
        labels = np.concatenate([next(loader)[1].numpy() for loader in loaders])
        np.testing.assert_array_equal(labels, indices[8 * step : 8 * (step + 1)])


def test_image_paths_may_have_any_characters(tmp_path: Path) -> None:
    path = tmp_path / "train/ein Ordner, größer" / "ein Bild (1).png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)
    loader = TrainLoader(
        open_set(DataConfig(root=str(tmp_path)), "train", 1),
        (8, 8),
        DataConfig(global_batch_size=1, num_threads=1),
        AugmentConfig(),
        seed=0,
        start_step=0,
        dp_rank=0,
        dp_size=1,
        device_id=None,
    )
    images, _ = next(loader)
    assert images.numpy()[0, :, 4, 4].tolist() == [1, -1, -1]
