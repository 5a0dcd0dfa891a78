"""Batches for the compiled program: DALI's outputs as Paddle tensors, without a copy, and how long they took."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle.utils.dlpack import from_dlpack

from vit_static.common.errors import DataError
from vit_static.config.schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_pipeline import decoders_words, decoding_pipeline, eval_pipeline, train_pipeline
from vit_static.data.image_set import ImageDataset
from vit_static.data.prefetch import EncodedBatch, Prefetcher
from vit_static.data.sampler import ShuffledSampler, nth_batch

Batch = tuple[paddle.Tensor, ...]


class TrainLoader:
    """An endless iterator of (images [B, 3, height, width], labels [B]): this rank's part of each global batch.

    It starts behind `start_step` whole batches, and passes over those whose numbers are `skipped_batches`. With
    `data.multi_label`, labels are [B, num_classes] uint8, 1 for those that an image has. `seconds_waited` adds up how
    long batches were waited for. After a DataError, which names the image, the feed is at its end.
    """

    def __init__(
        self,
        images: ImageDataset,
        image_size: tuple[int, int],
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        start_step: int,
        skipped_batches: tuple[int, ...] = (),
        dp_rank: int,
        dp_size: int,
        device_id: int | None,
    ) -> None:
        self.seconds_waited = 0.0
        self._start_step, self._left_out = start_step, skipped_batches
        self._images, self._image_size, self._augment = images, image_size, augment
        self._multi_hot = len(images.class_names) if data.multi_label else None
        self._order = ShuffledSampler(len(images), seed, augment.repeated_aug)
        self._num_draws = num_draws_per_image(augment)
        self._global_batch_size = data.global_batch_size
        self._batch_size = data.global_batch_size // dp_size
        self._first_place = dp_rank * self._batch_size  # in a global batch
        self._reader = Prefetcher(images, lambda n: self._order.indices(*self._positions(n)), data)
        pipeline = train_pipeline(self._source, self._batch_size, image_size, data, augment, device_id)
        self._outputs = _Outputs(pipeline, images, self._reader, data.prefetch_batches, device_id)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._outputs.next()
        self.seconds_waited = self._outputs.seconds_waited
        return batch

    def _positions(self, n: int) -> tuple[int, int]:
        batch = nth_batch(self._start_step + n, self._left_out)
        start = batch * self._global_batch_size + self._first_place
        return start, start + self._batch_size

    def _source(self, n: int) -> tuple[Any, ...]:
        batch = self._outputs.read(n)
        positions = self._positions(n)
        values: tuple[np.ndarray, ...] = ()
        if self._num_draws:
            draws = self._order.augmentation_draws(*positions, self._num_draws)
            values = tuple(op_parameters(draws, self._augment, self._image_size).values())
        return batch.encoded, _labels(batch, self._multi_hot), self._order.crop_flip_draws(*positions), *values


class EvalLoader:
    """One pass over a set, each image once: an iterable of (images, labels, weights [B]) of this rank's part.

    The images are dealt out in whole batches of `batch_size` over all ranks; the last is filled up with copies
    of the first image, of weight 0. Every pass builds a pipeline of its own, so none is held while training.
    """

    def __init__(
        self,
        images: ImageDataset,
        image_size: tuple[int, int],
        batch_size: int,
        data: DataConfig,
        evaluation: EvalConfig,
        *,
        dp_rank: int,
        dp_size: int,
        device_id: int | None,
    ) -> None:
        self.images, self._image_size = images, image_size
        self._data, self._evaluation = data, evaluation
        self._batch_size = batch_size // dp_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._device_id = device_id
        self._multi_hot = len(images.class_names) if data.multi_label else None

    def __len__(self) -> int:
        return math.ceil(len(self.images) / (self._batch_size * self._dp_size))

    def __iter__(self) -> Iterator[Batch]:
        def source(n: int) -> tuple[Any, ...]:
            n = min(n, len(self) - 1)  # DALI asks for batches beyond the last
            batch = outputs.read(n)
            return batch.encoded, _labels(batch, self._multi_hot), self.indices(n)[1].astype(np.float32)

        reader = Prefetcher(self.images, lambda n: self.indices(n)[0], self._data)
        pipeline = eval_pipeline(
            source, self._batch_size, self._image_size, self._data, self._evaluation, self._device_id
        )
        outputs = _Outputs(pipeline, self.images, reader, self._data.prefetch_batches, self._device_id)
        try:
            for _ in range(len(self)):
                yield outputs.next()
        finally:
            reader.close()
            outputs.close()

    def read(self, numbers: np.ndarray) -> EncodedBatch:
        """Some images of the set, at least one, as they are stored. Raises DataError as a pass does."""
        reader = Prefetcher(self.images, lambda n: numbers[:0] if n else numbers, self._data)
        try:
            return reader.batch(0)
        finally:
            reader.close()

    def indices(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's images of the n-th batch, by number, and which of them are there for the first time."""
        start = (n * self._dp_size + self._dp_rank) * self._batch_size
        numbers = np.arange(start, start + self._batch_size)
        real = numbers < len(self.images)
        return np.where(real, numbers, 0), real


class _Outputs:
    """A pipeline's outputs as Paddle tensors that share DALI's memory, which is held as long as it can be read."""

    def __init__(
        self, pipeline: Any, images: ImageDataset, reader: Prefetcher, num_ahead: int, device_id: int | None
    ) -> None:
        self.seconds_waited = 0.0  # for the pipeline alone, not for the card
        self._pipeline = pipeline
        self._images, self._reader = images, reader
        self._device_id = device_id
        self._in_use: deque[tuple[Any, Any]] = deque()
        self._last: Any = None
        self._in_flight: deque[np.ndarray] = deque(maxlen=num_ahead + 1)  # images that DALI may be at
        self._failure: DataError | None = None

    def close(self) -> None:
        """Lets go of the pipeline, which refers to its source, and that to this: its memory would else be held until
        Python looks for such circles."""
        self._pipeline = self._last = None
        self._in_use.clear()

    def read(self, n: int) -> EncodedBatch:
        """What the pipeline's source gets its images from."""
        try:
            batch = self._reader.batch(n)
        except DataError as error:
            self._failure = error  # DALI may hide it in one of its own
            raise
        self._in_flight.append(batch.numbers)
        return batch

    def next(self) -> Batch:
        if self._device_id is not None and self._last is not None:
            # The card may still be reading earlier batches. Work queued so far includes the last batch's step;
            # waiting for the one before it keeps the host at most two steps ahead.
            event = paddle.device.Event()
            event.record()
            self._in_use.append((event, self._last))
            if len(self._in_use) > 2:
                self._in_use.popleft()[0].synchronize()
        started = time.perf_counter()
        try:
            self._last = self._pipeline.run()
        except (DataError, RuntimeError) as error:
            raise self._explained(error) from None
        self.seconds_waited += time.perf_counter() - started
        batch = tuple(from_dlpack(output.as_tensor()) for output in self._last)
        # Labels and weights come from the host; the program on a card takes all of its inputs there.
        return batch if self._device_id is None else tuple(part.cuda() for part in batch)

    def _explained(self, error: Exception) -> Exception:
        """What to tell of a pipeline that stopped. DALI doesn't always name the file, so each is decoded once more."""
        if self._failure is not None:
            return self._failure
        for number in dict.fromkeys(np.concatenate([np.empty(0, np.int64), *self._in_flight]).tolist()):
            problem = why_undecodable(self._images, number, self._device_id)
            if problem is not None:
                return problem
        return error


def why_undecodable(images: ImageDataset, number: int, device_id: int | None = None) -> DataError | None:
    """What keeps training from reading an image, or None where nothing does."""
    try:
        encoded, _ = images.read(number)
        decoding_pipeline(1, 1, device_id).run(encoded=[encoded])
    except DataError as problem:
        return problem
    except RuntimeError as problem:
        said = f"is not an image that DALI can decode ({decoders_words(problem)}); mend or remove the file"
        return DataError(f"{images.name(number)}: {said}")
    return None


def _labels(batch: EncodedBatch, multi_hot: int | None) -> np.ndarray:
    """[B] int64, or [B, multi_hot] uint8 of zeros and, for the labels that an image has, ones."""
    if multi_hot is None:
        return np.concatenate(batch.labels).astype(np.int64)
    rows = np.zeros((len(batch.labels), multi_hot), np.uint8)
    for row, labels in zip(rows, batch.labels, strict=True):
        row[labels] = 1
    return rows
