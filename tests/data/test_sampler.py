"""The order of the training images and the random numbers that go with them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_static.config.schema import AugmentConfig, DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.loader import TrainLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import NUM_CROP_FLIP_DRAWS, ShuffledSampler


def in_chunks(read, stop: int, size: int) -> np.ndarray:
    """read(0, stop), asked for in chunks."""
    return np.concatenate([read(start, min(start + size, stop)) for start in range(0, stop, size)])


@pytest.mark.parametrize("num_images", [1, 2, 13, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 250])
def test_every_image_comes_exactly_once_an_epoch(num_images: int, batch_size: int) -> None:
    """With batches that end inside an epoch, that reach over its end, and that are longer than it."""
    line = in_chunks(ShuffledSampler(num_images, seed=3).indices, 4 * num_images, batch_size)
    for epoch in line.reshape(4, num_images):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_images))


def test_epochs_differ_and_none_is_the_list_itself() -> None:
    epochs = ShuffledSampler(100, seed=0).indices(0, 500).reshape(5, 100)
    assert len({tuple(epoch) for epoch in [*epochs, np.arange(100)]}) == 6


def test_neighbours_in_the_list_are_no_neighbours_in_the_line() -> None:
    """Of 999 pairs in a shuffle, 2 on average are of neighbours."""
    steps = np.abs(np.diff(ShuffledSampler(1000, seed=0).indices(0, 1000)))
    assert (steps == 1).sum() < 12
    assert 300 < steps.mean() < 367  # 1000 / 3


def test_the_seed_makes_the_order_and_the_draws() -> None:
    def line(seed: int) -> tuple[list[int], list[float]]:
        order = ShuffledSampler(100, seed)
        return order.indices(0, 100).tolist(), order.crop_flip_draws(0, 4).ravel().tolist()

    assert line(5) == line(5)
    assert line(5)[0] != line(6)[0]
    assert line(5)[1] != line(6)[1]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_line_doesnt_depend_on_how_it_is_asked_for(size: int) -> None:
    whole = ShuffledSampler(13, seed=1)
    chunked = ShuffledSampler(13, seed=1)
    np.testing.assert_array_equal(in_chunks(chunked.indices, 200, size), whole.indices(0, 200))
    np.testing.assert_array_equal(in_chunks(chunked.crop_flip_draws, 200, size), whole.crop_flip_draws(0, 200))


def test_the_line_can_be_entered_anywhere_and_in_any_order() -> None:
    order = ShuffledSampler(13, seed=1)
    line, draws = order.indices(0, 200), order.crop_flip_draws(0, 200)
    for start in (150, 0, 37, 12, 13, 150):
        np.testing.assert_array_equal(order.indices(start, start + 30), line[start : start + 30])
        np.testing.assert_array_equal(order.crop_flip_draws(start, start + 30), draws[start : start + 30])


def test_positions_of_a_trillion_are_quick() -> None:
    started = time.perf_counter()
    order = ShuffledSampler(1000, seed=1)
    first, draws = order.indices(10**12, 10**12 + 2000), order.crop_flip_draws(10**12, 10**12 + 64)
    assert time.perf_counter() - started < 1
    np.testing.assert_array_equal(np.sort(first.reshape(2, 1000)), [np.arange(1000)] * 2)
    np.testing.assert_array_equal(draws[10:20], order.crop_flip_draws(10**12 + 10, 10**12 + 20))
    assert not np.array_equal(draws, order.crop_flip_draws(0, 64))


def test_draws_are_uniform_and_differ_by_position_and_by_column() -> None:
    draws = ShuffledSampler(7, seed=2).crop_flip_draws(0, 10_000)
    assert draws.shape == (10_000, NUM_CROP_FLIP_DRAWS)
    assert draws.dtype == np.float32
    assert draws.min() >= 0 and draws.max() < 1
    assert len(np.unique(draws, axis=0)) == 10_000  # the 7 images' draws are other ones every epoch
    # Five standard deviations of a tenth's count (n = 10,000) and of a mean
    for column in draws.T:
        counts = np.histogram(column, bins=10, range=(0, 1))[0]
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(900)
        assert abs(column.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 10_000)
    between_columns = np.corrcoef(draws.T) - np.eye(NUM_CROP_FLIP_DRAWS)
    assert np.abs(between_columns).max() < 0.05
    between_neighbours = np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]
    assert abs(between_neighbours) < 0.01


def test_no_draw_is_rounded_up_to_1() -> None:
    """In float64 this one is above 1 - 2**-25, which float32 rounds to 1: one draw of 30 million, 275 in a run."""
    assert ShuffledSampler(1, seed=2).crop_flip_draws(1_416_165, 1_416_166).max() < 1


@pytest.mark.parametrize("num_images", [6, 13, 100])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_images_come_together_and_an_epoch_has_fewer(num_images: int, repeats: int) -> None:
    line = ShuffledSampler(num_images, seed=3, repeated_aug=repeats).indices(0, 4 * num_images).reshape(4, num_images)
    once = ShuffledSampler(num_images, seed=3).indices(0, 4 * num_images).reshape(4, num_images)
    for epoch, shuffle in zip(line, once, strict=True):
        images, counts = np.unique(epoch, return_counts=True)
        assert counts.max() == repeats
        assert (counts < repeats).sum() <= 2  # those that the end of the epoch cuts off
        assert set(images) == set(shuffle[: len(images)])
        for image in images:
            places = np.flatnonzero(epoch == image)
            assert places[-1] - places[0] <= 2 * (repeats - 1)
        assert (epoch[1:] != epoch[:-1]).all()  # what is mixed with each other


def test_repeats_of_1_are_the_usual_order() -> None:
    np.testing.assert_array_equal(
        ShuffledSampler(13, seed=3, repeated_aug=1).indices(0, 50), ShuffledSampler(13, seed=3).indices(0, 50)
    )


def test_augmentations_have_draws_of_their_own() -> None:
    order = ShuffledSampler(7, seed=2)
    draws = order.augmentation_draws(0, 50, 24)
    assert not np.isin(draws, order.crop_flip_draws(0, 50)).any()
    np.testing.assert_array_equal(order.augmentation_draws(20, 30, 24), draws[20:30])
    assert len(np.unique(order.augmentation_draws(0, 1000, 12), axis=0)) == 1000


@pytest.fixture(scope="module")
def numbered_images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Ten images, each of a class of its own: a batch's labels tell its images."""
    root = tmp_path_factory.mktemp("numbered")
    for number in range(10):
        (root / "train" / str(number)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, number, number)).save(root / "train" / str(number) / "image.png")
    return open_set(DataConfig(root=str(root)), "train", 10)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_ranks_batches_together_are_the_global_batch(numbered_images: ImageDataset, dp_size: int) -> None:
    """Batches of 8 of 10 images, from the fourth step on."""
    feeds = [
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
    line = ShuffledSampler(10, seed=9).indices(0, 8 * 7)
    for step in range(3, 7):
        labels = np.concatenate([next(feed)[1].numpy() for feed in feeds])
        np.testing.assert_array_equal(labels, line[8 * step : 8 * (step + 1)])


def test_image_paths_may_hold_any_character(tmp_path: Path) -> None:
    path = tmp_path / "train/ein Ordner, größer" / "ein Bild (1).png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)
    feed = TrainLoader(
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
    images, _ = next(feed)
    assert images.numpy()[0, :, 4, 4].tolist() == [1, -1, -1]
