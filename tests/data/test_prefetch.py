"""Reading ahead: every batch as it was asked for; what can't be read, or never comes, is named."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from vit_static.common.errors import DataError
from vit_static.config.schema import DataConfig
from vit_static.data.image_set import FileDataset
from vit_static.data.open_set import open_set
from vit_static.data.prefetch import Prefetcher


@pytest.fixture
def listed(tmp_path: Path) -> FileDataset:
    """Twenty small files of a list; file n holds n + 1 times the byte n, and has label n."""
    for number in range(20):
        (tmp_path / f"{number}.bin").write_bytes(bytes([number]) * (number + 1))
    (tmp_path / "list.txt").write_text("".join(f"{number}.bin {number}\n" for number in range(20)))
    images = open_set(DataConfig(root=str(tmp_path), train="list.txt"), "train", 20)
    assert isinstance(images, FileDataset)
    return images


def reader(images: FileDataset, batch_size: int = 5, **data: float) -> Prefetcher:
    def numbers_of(n: int) -> np.ndarray:
        return np.arange(n * batch_size, (n + 1) * batch_size) % len(images)

    return Prefetcher(images, numbers_of, DataConfig(**data))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_readers", [1, 2, 7])
def test_batches_come_as_they_are_asked_for(listed: FileDataset, num_readers: int) -> None:
    files = reader(listed, num_readers=num_readers)
    for n in range(8):
        batch = files.batch(n)
        numbers = [(5 * n + place) % 20 for place in range(5)]
        assert [encoded.tobytes() for encoded in batch.encoded] == [bytes([k]) * (k + 1) for k in numbers]
        assert np.concatenate(batch.labels).tolist() == numbers
    assert files.batch(7) is files.batch(7)


@pytest.mark.parametrize(("harm", "said"), [("gone", "No such file"), ("empty", "is empty"), ("a folder", "director")])
def test_a_file_that_cant_be_read_is_named_when_its_batch_is_due(
    listed: FileDataset, tmp_path: Path, harm: str, said: str
) -> None:
    bad = tmp_path / "7.bin"
    bad.unlink()
    if harm == "empty":
        bad.touch()
    elif harm == "a folder":
        bad.mkdir()
    files = reader(listed)
    assert len(files.batch(0).encoded) == 5
    with pytest.raises(DataError, match=said) as error:
        files.batch(1)
    assert str(bad) in str(error.value)


class DeadDisk(FileDataset):
    """Whose eighth file is waited for for ever, as one on a network disk may be: a pipe that nobody writes to."""

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number == 8:
            os.close(os.open(self.name(number), os.O_RDONLY))
        return super()._read(number)


def test_a_read_that_never_ends_is_an_error_with_the_path(listed: FileDataset, tmp_path: Path) -> None:
    (tmp_path / "8.bin").unlink()
    os.mkfifo(tmp_path / "8.bin")
    files = reader(DeadDisk(listed.root, listed.image_list, listed.class_names), read_timeout_s=0.8, num_readers=2)
    assert len(files.batch(0).encoded) == 5
    with pytest.raises(DataError) as error:
        files.batch(1)
    assert str(tmp_path / "8.bin") in str(error.value)
    assert "data.read_timeout_s" in str(error.value)


class SlowSet(FileDataset):
    """Files of a disk that takes its time for each."""

    seconds = 0.3

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        threading.Event().wait(self.seconds)
        return super()._read(number)


def test_a_slow_disk_is_waited_for_while_it_gives_something(listed: FileDataset) -> None:
    slow = SlowSet(Path(listed.name(0)).parent, listed.image_list, listed.class_names)
    assert len(reader(slow, read_timeout_s=1.0, num_readers=1).batch(0).encoded) == 5  # 1.5 s in all
    slow.seconds = 2.0
    with pytest.raises(DataError, match="given nothing for 1 s"):
        reader(slow, read_timeout_s=1.0, num_readers=1).batch(0)


def test_threads_end_with_their_reader(listed: FileDataset) -> None:
    earlier = set(threading.enumerate())  # among them, perhaps, those of other tests' readers
    files = reader(listed, num_readers=3)
    files.batch(0)
    started = [thread for thread in set(threading.enumerate()) - earlier if thread.name == "vit_static reader"]
    assert len(started) == 3
    del files
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
