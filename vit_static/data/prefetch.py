"""Reading of encoded images ahead of DALI, by threads of our own, so that errors and timeouts name the file.

DALI can read files as well, but it doesn't name some files that can't be read, and waits forever for a disk that
doesn't respond. Reading releases Python's global lock and is as fast (`bench data` shows its share). The threads also
decode the images that DALI wouldn't decode to Pillow's pixels (image_pixels.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from vit_static.common.errors import DataError
from vit_static.common.text import say
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_pixels import DecodeOptions, decode_options
from vit_static.data.image_set import ImageDataset

_NOTICE_AFTER_S = 10.0  # of waiting for one batch
_POLL_INTERVAL_S = 0.5


@dataclass
class EncodedBatch:
    """The encoded images [num_bytes] uint8, prepared for DALI, and the labels [num_labels] of a batch.

    It is complete when `done` is set. If an image can't be read, `done` is set at once and `error` says why.
    """

    indices: np.ndarray  # of the images in the dataset
    encoded: list[np.ndarray] = field(init=False)
    labels: list[np.ndarray] = field(init=False)
    done: threading.Event = field(default_factory=threading.Event)
    error: DataError | None = None

    def __post_init__(self) -> None:
        empty = np.empty(0, np.uint8)
        self.encoded, self.labels = [empty] * len(self.indices), [empty] * len(self.indices)
        self._num_pending = len(self.indices)
        self._lock = threading.Lock()

    def read(self, images: ImageDataset, position: int, options: DecodeOptions) -> None:
        """Read the image at a position in the batch, for DALI."""
        try:
            index = int(self.indices[position])
            self.encoded[position], self.labels[position] = images.read_for_dali(index, options)
        except DataError as error:
            self.error = error
            self.done.set()
        with self._lock:
            self._num_pending -= 1
            if self._num_pending == 0:
                self.done.set()

    @property
    def num_pending(self) -> int:
        return self._num_pending


class Prefetcher:
    """Threads that read the batches that follow. They end with the process, or when this object is deleted.

    `batch_indices(n)` returns the dataset indices of the n-th batch's images.
    """

    def __init__(self, images: ImageDataset, batch_indices: Callable[[int], np.ndarray], data: DataConfig) -> None:
        self._images, self._batch_indices = images, batch_indices
        self._prefetch_batches = data.prefetch_batches
        self._timeout_s = data.read_timeout_s
        self._requested: dict[int, EncodedBatch] = {}
        self._tasks: SimpleQueue[tuple[EncodedBatch, int] | None] = SimpleQueue()
        self._active_reads: dict[int, tuple[int, float]] = {}  # by thread: the image's index, and when it started
        self._num_threads = data.num_readers
        for thread_number in range(data.num_readers):
            # Daemons, so that a thread that hangs in a read doesn't keep the process from ending.
            arguments = (thread_number, images, decode_options(data), self._tasks, self._active_reads)
            threading.Thread(target=_work, args=arguments, daemon=True, name="vit_static reader").start()

    def close(self) -> None:
        """End the threads, as the deletion of this object does."""
        for _ in range(self._num_threads):
            self._tasks.put(None)
        self._num_threads = 0

    __del__ = close

    def batch(self, n: int) -> EncodedBatch:
        """Wait for the n-th batch, and request those that follow. Successive calls may not go back.

        Raise DataError, with the path, if a file can't be read, or if reading makes no progress within the timeout.
        """
        for number in range(n, n + 1 + self._prefetch_batches):
            if number not in self._requested:
                self._request(number)
        self._requested = {number: batch for number, batch in self._requested.items() if number >= n}
        batch = self._requested[n]
        self._wait_for(batch)
        if batch.error is not None:
            raise batch.error
        return batch

    def _request(self, n: int) -> None:
        batch = self._requested[n] = EncodedBatch(self._batch_indices(n))
        for position in range(len(batch.indices)):
            self._tasks.put((batch, position))

    def _wait_for(self, batch: EncodedBatch) -> None:
        started = last_progress = time.monotonic()
        num_pending, has_notified = batch.num_pending, False
        while not batch.done.wait(_POLL_INTERVAL_S):
            now = time.monotonic()
            if batch.num_pending != num_pending:
                num_pending, last_progress = batch.num_pending, now
            name = self._slowest()
            if now - last_progress > self._timeout_s:
                raise DataError(
                    f"{name}: no data after {self._timeout_s:.0f} s of reading; check the disk or the network that it "
                    "is on, or set data.read_timeout_s higher"
                )
            if not has_notified and now - started > _NOTICE_AFTER_S:
                has_notified = True
                say(f"waiting for images for {now - started:.0f} s, currently for {name}")

    def _slowest(self) -> str:
        """Return the name of the image whose read started first."""
        active_reads = sorted(self._active_reads.copy().values(), key=lambda index_and_start: index_and_start[1])
        return self._images.name(active_reads[0][0]) if active_reads else "images"


def _work(
    thread_number: int,
    images: ImageDataset,
    options: DecodeOptions,
    tasks: SimpleQueue[Any],
    active_reads: dict[int, tuple[int, float]],
) -> None:
    """Read until a task is None. Refers to no prefetcher, so that a prefetcher can be deleted while threads run."""
    while (task := tasks.get()) is not None:
        batch, position = task
        active_reads[thread_number] = int(batch.indices[position]), time.monotonic()
        batch.read(images, position, options)
        active_reads.pop(thread_number, None)
