"""Prefetching: the batches requested, and errors that name the file."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sets import photo

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import FileDataset
from vit_static.data.open_set import open_set
from vit_static.data.prefetch import Prefetcher


@pytest.fixture
def dataset(tmp_path: Path) -> FileDataset:
    """Twenty small JPEG files in a list; image n is n + 1 pixels wide, and has the label n."""
    for number in range(20):
        photo(8, number + 1, seed=number).save(tmp_path / f"{number}.bin", "JPEG")
    (tmp_path / "list.txt").write_text("".join(f"{number}.bin {number}\n" for number in range(20)))
    images = open_set(DataConfig(root=str(tmp_path), train="list.txt"), "train", 20)
    assert isinstance(images, FileDataset)
    return images


def make_prefetcher(images: FileDataset, batch_size: int = 5, **data: Any) -> Prefetcher:
    def batch_indices(n: int) -> np.ndarray:
        return np.arange(n * batch_size, (n + 1) * batch_size) % len(images)

    return Prefetcher(images, batch_indices, DataConfig(**data))


@pytest.mark.parametrize("num_readers", [1, 2, 7])
def test_batches_have_the_images_requested(dataset: FileDataset, num_readers: int) -> None:
    prefetcher = make_prefetcher(dataset, num_readers=num_readers)
    files = [Path(dataset.name(index)).read_bytes() for index in range(20)]
    for n in range(8):
        batch = prefetcher.batch(n)
        indices = [(5 * n + position) % 20 for position in range(5)]
        assert [encoded.tobytes() for encoded in batch.encoded] == [files[k] for k in indices]
        assert np.concatenate(batch.labels).tolist() == indices
    assert prefetcher.batch(7) is prefetcher.batch(7)


@pytest.mark.parametrize(
    ("damage", "message"), [("gone", "No such file"), ("empty", "is empty"), ("a folder", "director")]
)
def test_an_unreadable_file_is_named_when_its_batch_is_requested(
    dataset: FileDataset, tmp_path: Path, damage: str, message: str
) -> None:
    bad = tmp_path / "7.bin"
    bad.unlink()
    if damage == "empty":
        bad.touch()
    elif damage == "a folder":
        bad.mkdir()
    prefetcher = make_prefetcher(dataset)
    assert len(prefetcher.batch(0).encoded) == 5
    with pytest.raises(DataError, match=message) as error:
        prefetcher.batch(1)
    assert str(bad) in str(error.value)


class HangingDataset(FileDataset):
    """Reading image 8 never returns, as on a network disk that doesn't respond: it is a pipe without a writer."""

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 8:
            os.close(os.open(self.name(index), os.O_RDONLY))
        return super()._read(index)


def test_a_read_that_never_returns_is_an_error_with_the_path(dataset: FileDataset, tmp_path: Path) -> None:
    (tmp_path / "8.bin").unlink()
    os.mkfifo(tmp_path / "8.bin")
    prefetcher = make_prefetcher(
        HangingDataset(dataset.root, dataset.image_list, dataset.class_names), read_timeout_s=0.8, num_readers=2
    )
    assert len(prefetcher.batch(0).encoded) == 5
    with pytest.raises(DataError) as error:
        prefetcher.batch(1)
    assert str(tmp_path / "8.bin") in str(error.value)
    assert "data.read_timeout_s" in str(error.value)


class SlowDataset(FileDataset):
    """Every read takes some seconds."""

    seconds = 0.3

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        threading.Event().wait(self.seconds)
        return super()._read(index)


def test_a_slow_disk_is_no_error_while_reads_succeed(dataset: FileDataset) -> None:
    slow = SlowDataset(Path(dataset.name(0)).parent, dataset.image_list, dataset.class_names)
    assert len(make_prefetcher(slow, read_timeout_s=1.0, num_readers=1).batch(0).encoded) == 5  # 1.5 s in all
    slow.seconds = 2.0
    with pytest.raises(DataError, match="no data after 1 s"):
        make_prefetcher(slow, read_timeout_s=1.0, num_readers=1).batch(0)


def test_threads_end_when_the_prefetcher_is_deleted(dataset: FileDataset) -> None:
    earlier = set(threading.enumerate())  # possibly with those of other tests
    prefetcher = make_prefetcher(dataset, num_readers=3)
    prefetcher.batch(0)
    started = [thread for thread in set(threading.enumerate()) - earlier if thread.name == "vit_static reader"]
    assert len(started) == 3
    del prefetcher
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
