"""Batches of files, read ahead by threads of our own: what fails or hangs is known by its path.

DALI would read files, too, but it names no path for some that can't be read, and waits for ever for a disk that doesn't
answer. Reading lets go of Python's lock, and is as quick (`bench data` shows its share).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from vit_static.common.errors import DataError
from vit_static.config.schema import DataConfig
from vit_static.data.image_set import ImageDataset

_SAY_AFTER_S = 10.0  # that a batch is waited for
_LOOK_EVERY_S = 0.5


@dataclass
class EncodedBatch:
    """A batch's encoded images [num_bytes] uint8 and their labels [num_labels], when `done` is set; or what failed."""

    numbers: np.ndarray
    encoded: list[np.ndarray] = field(init=False)
    labels: list[np.ndarray] = field(init=False)
    done: threading.Event = field(default_factory=threading.Event)
    failure: DataError | None = None

    def __post_init__(self) -> None:
        nothing = np.empty(0, np.uint8)
        self.encoded, self.labels = [nothing] * len(self.numbers), [nothing] * len(self.numbers)
        self._num_left = len(self.numbers)
        self._lock = threading.Lock()

    def read(self, images: ImageDataset, place: int) -> None:
        """Reads the image at a place of the batch."""
        try:
            self.encoded[place], self.labels[place] = images.read(int(self.numbers[place]))
        except DataError as error:
            self.failure = error
            self.done.set()
        with self._lock:
            self._num_left -= 1
            if self._num_left == 0:
                self.done.set()

    @property
    def num_left(self) -> int:
        return self._num_left


class Prefetcher:
    """Batch n is read by the time that `batch(n)` is asked for, if the disk keeps up; n must not go down.

    `numbers_of` gives a batch's images. Threads end with the process, or once the reader is gone.
    """

    def __init__(self, images: ImageDataset, numbers_of: Callable[[int], np.ndarray], data: DataConfig) -> None:
        self._images, self._numbers_of = images, numbers_of
        self._num_ahead = data.prefetch_batches
        self._timeout_s = data.read_timeout_s
        self._asked: dict[int, EncodedBatch] = {}
        self._tasks: SimpleQueue[tuple[EncodedBatch, int] | None] = SimpleQueue()
        self._now_reading: dict[int, tuple[int, float]] = {}  # by thread: the image, and since when
        self._num_threads = data.num_readers
        for number in range(data.num_readers):
            # Daemons: one that hangs in a read doesn't keep the process from ending.
            arguments = (number, images, self._tasks, self._now_reading)
            threading.Thread(target=_work, args=arguments, daemon=True, name="vit_static reader").start()

    def close(self) -> None:
        """Ends the threads, as the end of the reader does."""
        for _ in range(self._num_threads):
            self._tasks.put(None)
        self._num_threads = 0

    __del__ = close

    def batch(self, n: int) -> EncodedBatch:
        """Waits for a batch. Raises DataError, with the path, where a file can't be read or gives nothing in time."""
        for wanted in range(n, n + 1 + self._num_ahead):
            if wanted not in self._asked:
                self._ask(wanted)
        self._asked = {number: batch for number, batch in self._asked.items() if number >= n}
        batch = self._asked[n]
        self._wait_for(batch)
        if batch.failure is not None:
            raise batch.failure
        return batch

    def _ask(self, n: int) -> None:
        batch = self._asked[n] = EncodedBatch(self._numbers_of(n))
        for place in range(len(batch.numbers)):
            self._tasks.put((batch, place))

    def _wait_for(self, batch: EncodedBatch) -> None:
        started = last_progress = time.monotonic()
        num_left, has_said = batch.num_left, False
        while not batch.done.wait(_LOOK_EVERY_S):
            now = time.monotonic()
            if batch.num_left != num_left:
                num_left, last_progress = batch.num_left, now
            name = self._slowest()
            if now - last_progress > self._timeout_s:
                raise DataError(
                    f"{name}: reading it has given nothing for {self._timeout_s:.0f} s; see to the disk or the "
                    "network that it is on, or set data.read_timeout_s higher"
                )
            if not has_said and now - started > _SAY_AFTER_S:
                has_said = True
                print(f"vit_static: waiting for images for {now - started:.0f} s, now for {name}", file=sys.stderr)

    def _slowest(self) -> str:
        """What has been read for longest."""
        reading = sorted(self._now_reading.copy().values(), key=lambda image_and_start: image_and_start[1])
        return self._images.name(reading[0][0]) if reading else "its files"


def _work(
    number: int, images: ImageDataset, tasks: SimpleQueue[Any], now_reading: dict[int, tuple[int, float]]
) -> None:
    """A thread: it holds no reference to the reader, whose end ends it."""
    while (task := tasks.get()) is not None:
        batch, place = task
        now_reading[number] = int(batch.numbers[place]), time.monotonic()
        batch.read(images, place)
        now_reading.pop(number, None)
