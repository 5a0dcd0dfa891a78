"""Batches for the compiled program: DALI's outputs as Paddle tensors, without a copy, and how long they took."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle.utils.dlpack import from_dlpack

from vit_static.config import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.images import DataError, ImageList
from vit_static.data.order import TrainOrder
from vit_static.data.pipeline import eval_pipeline, files_pipeline, train_pipeline

Batch = tuple[paddle.Tensor, ...]


class TrainFeed:
    """An endless iterator of (images [B, 3, height, width], labels [B]): this rank's part of each global batch.

    It starts behind `start_step` whole batches. `seconds_waited` adds up how long batches were waited for.
    """

    def __init__(
        self,
        images: ImageList,
        image_size: tuple[int, int],
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        start_step: int,
        dp_rank: int,
        dp_size: int,
        device_id: int | None,
    ) -> None:
        self.seconds_waited = 0.0
        self._images = images
        self._order = TrainOrder(len(images), seed)
        self._global_batch_size = data.global_batch_size
        self._batch_size = data.global_batch_size // dp_size
        self._first_position = start_step * data.global_batch_size + dp_rank * self._batch_size
        self._num_taken = 0
        pipeline = train_pipeline(self._source, self._batch_size, image_size, data, augment, device_id)
        self._outputs = _Outputs(pipeline, on_card=device_id is not None)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch = self._outputs.next()
        except RuntimeError as error:
            in_flight = [self._numbers(n) for n in range(self._num_taken, self._num_taken + 3)]
            raise _unreadable(error, self._images, np.concatenate(in_flight)) from None
        self._num_taken += 1
        self.seconds_waited = self._outputs.seconds_waited
        return batch

    def _positions(self, n: int) -> tuple[int, int]:
        start = self._first_position + n * self._global_batch_size
        return start, start + self._batch_size

    def _numbers(self, n: int) -> np.ndarray:
        return self._order.images(*self._positions(n))

    def _source(self, n: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        numbers = self._numbers(n)
        return _names(self._images, numbers), self._images.labels[numbers], self._order.draws(*self._positions(n))


class EvalFeed:
    """One pass over a set, each image once: an iterable of (images, labels [B], weights [B]) of this rank's part.

    The images are dealt out in whole batches of `batch_size` over all ranks; the last is filled up with copies
    of the first image, of weight 0. Every pass builds a pipeline of its own, so none is held while training.
    """

    def __init__(
        self,
        images: ImageList,
        image_size: tuple[int, int],
        batch_size: int,
        data: DataConfig,
        evaluation: EvalConfig,
        *,
        dp_rank: int,
        dp_size: int,
        device_id: int | None,
    ) -> None:
        self._images = images
        self._batch_size = batch_size // dp_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._make = lambda: eval_pipeline(self._source, self._batch_size, image_size, data, evaluation, device_id)
        self._on_card = device_id is not None

    def __len__(self) -> int:
        return math.ceil(len(self._images) / (self._batch_size * self._dp_size))

    def __iter__(self) -> Iterator[Batch]:
        outputs = _Outputs(self._make(), on_card=self._on_card)
        for n in range(len(self)):
            try:
                yield outputs.next()
            except RuntimeError as error:
                in_flight = [self._numbers(n + ahead)[0] for ahead in range(3)]
                raise _unreadable(error, self._images, np.concatenate(in_flight)) from None

    def _numbers(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The n-th batch's images, and which of them are there for the first time."""
        start = (n * self._dp_size + self._dp_rank) * self._batch_size
        numbers = np.arange(start, start + self._batch_size)
        real = numbers < len(self._images)
        return np.where(real, numbers, 0), real

    def _source(self, n: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        numbers, real = self._numbers(n)
        return _names(self._images, numbers), self._images.labels[numbers], real.astype(np.float32)


class _Outputs:
    """A pipeline's outputs as Paddle tensors that share DALI's memory, which is held as long as it can be read."""

    def __init__(self, pipeline: Any, on_card: bool) -> None:
        self.seconds_waited = 0.0  # for the pipeline alone, not for the card
        self._pipeline = pipeline
        self._on_card = on_card
        self._in_use: deque[tuple[Any, Any]] = deque()
        self._last: Any = None

    def next(self) -> Batch:
        if self._on_card and self._last is not None:
            # The card may still be reading earlier batches. Work queued so far includes the last batch's step;
            # waiting for the one before it keeps the host at most two steps ahead.
            event = paddle.device.Event()
            event.record()
            self._in_use.append((event, self._last))
            if len(self._in_use) > 2:
                self._in_use.popleft()[0].synchronize()
        started = time.perf_counter()
        self._last = self._pipeline.run()
        self.seconds_waited += time.perf_counter() - started
        batch = tuple(from_dlpack(output.as_tensor()) for output in self._last)
        # Labels and weights come from the host; the program on a card takes all of its inputs there.
        return tuple(part.cuda() for part in batch) if self._on_card else batch


def _names(images: ImageList, numbers: np.ndarray) -> list[np.ndarray]:
    return [np.frombuffer(images.paths[number].encode(), np.uint8) for number in numbers]


def _unreadable(error: RuntimeError, images: ImageList, numbers: np.ndarray) -> DataError:
    """What to tell of a pipeline that stopped: DALI doesn't always name the file, so each is read once more."""
    pipeline = files_pipeline()
    for path in dict.fromkeys(images.paths[number] for number in numbers):
        try:
            pipeline.run(name=[np.frombuffer(path.encode(), np.uint8)])
        except RuntimeError as problem:
            return DataError(
                f"{path}: is not an image that DALI can read ({_reason(problem)}); mend or remove the file"
            )
    return DataError(f"DALI could not read a batch of images: {_reason(error)}")


def _reason(error: RuntimeError) -> str:
    """What DALI says, without where in its sources it says so."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "[/" in line or "failed" in line.lower() or "failure" in line.lower()]
    return re.sub(r"^\[/[^]]*\] (\[[^]]*\] )?", "", (said or lines or ["no reason given"])[0])
