"""Training and evaluation loaders: DALI's outputs as Paddle tensors without a copy, and errors that name the image."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle.utils.dlpack import from_dlpack

from vit_static.common.errors import DataError
from vit_static.config.data_schema import AugmentConfig, DataConfig, EvalConfig
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_pipeline import eval_pipeline, train_pipeline
from vit_static.data.decoder_process import DECODING_BATCH_SIZE, DecoderProcess
from vit_static.data.image_set import ImageDataset
from vit_static.data.prefetch import EncodedBatch, Prefetcher
from vit_static.data.sampler import make_sampler, nth_batch

Batch = tuple[paddle.Tensor, ...]
_LOWEST_PRIORITY = 19  # setpriority(2)


@contextmanager
def _lowest_priority() -> Iterator[None]:
    """Give the threads that are started within the context the lowest priority, so that training goes first.

    Where training itself runs on the CPU, all of its threads wait at the end of each kernel if one of them has lost its
    core to a decoding thread. Batches that are needed at once are decoded while nothing else runs.
    """
    before = _thread_ids()
    yield
    for thread_id in _thread_ids() - before:
        with suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, thread_id, _LOWEST_PRIORITY)


def _thread_ids() -> set[int]:
    """Return the kernel's numbers of this process's threads; empty without Linux's /proc."""
    try:
        return {int(path.name) for path in Path("/proc/self/task").iterdir()}
    except OSError:
        return set()


class TrainLoader:
    """An endless iterator over (images [B, 3, height, width], labels [B]): this rank's part of each global batch.

    It starts after `start_step` batches and skips those with the numbers `skipped_batches`. Images are of `image_size`,
    height and width; or, with `image_size_at`, of the size that it returns for the batch after so many steps, which is
    at most `image_size`. With `data.multi_label`, labels are [B, num_classes] uint8, 1 for the labels of the image.
    `seconds_waited` is the total time spent waiting for batches. A DataError, which names the image, ends the iterator.
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
        image_size_at: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self.seconds_waited = 0.0
        self._start_step, self._skipped_batches = start_step, skipped_batches
        self._images, self._augment = images, augment
        self._image_size, self._image_size_at = image_size, image_size_at
        self._num_multi_hot = len(images.class_names) if data.multi_label else None
        self._sampler = make_sampler(images, data, seed, augment.repeated_aug)
        self._num_draws = num_draws_per_image(augment)
        self._global_batch_size = data.global_batch_size
        self._batch_size = data.global_batch_size // dp_size
        self._rank_offset = dp_rank * self._batch_size  # in a global batch
        self._prefetcher = Prefetcher(images, lambda n: self._sampler.indices(*self._positions(n)), data)
        with _lowest_priority() if device_id is None else nullcontext():
            pipeline = train_pipeline(
                self._source,
                self._batch_size,
                image_size,
                data,
                augment,
                device_id,
                size_varies=image_size_at is not None,
            )
        self._outputs = _PipelineOutputs(pipeline, images, self._prefetcher, data, device_id)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._outputs.next()
        self.seconds_waited = self._outputs.seconds_waited
        return batch

    def _positions(self, n: int) -> tuple[int, int]:
        """Return the first position and the end of this rank's part of the n-th batch since the start."""
        batch = nth_batch(self._start_step + n, self._skipped_batches)
        start = batch * self._global_batch_size + self._rank_offset
        return start, start + self._batch_size

    def _source(self, n: int) -> tuple[Any, ...]:
        batch = self._outputs.read(n)
        positions = self._positions(n)
        # DALI asks for batches ahead of time: each brings its size.
        size = self._image_size if self._image_size_at is None else self._image_size_at(self._start_step + n)
        values: tuple[np.ndarray, ...] = ()
        if self._num_draws:
            draws = self._sampler.augmentation_draws(*positions, self._num_draws)
            values = tuple(op_parameters(draws, self._augment, size).values())
        if self._image_size_at is not None:
            values = (*values, np.tile(np.array(size, np.int32), (self._batch_size, 1)))
        labels = _label_array(batch, self._num_multi_hot)
        return batch.encoded, labels, self._sampler.crop_flip_draws(*positions), *values


class EvalLoader:
    """One pass over a dataset, each image once: an iterable of this rank's (images, labels, weights [B]).

    All ranks together get batches of `batch_size`. The last batch is padded with copies of the first image, whose
    weight is 0. Every pass builds its own pipeline, so that none is in memory during training.
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
        self._num_multi_hot = len(images.class_names) if data.multi_label else None

    def __len__(self) -> int:
        return math.ceil(len(self.images) / (self._batch_size * self._dp_size))

    def __iter__(self) -> Iterator[Batch]:
        def source(n: int) -> tuple[Any, ...]:
            n = min(n, len(self) - 1)  # DALI asks for batches beyond the last
            batch = outputs.read(n)
            is_real = self.indices(n)[1]
            return batch.encoded, _label_array(batch, self._num_multi_hot), is_real.astype(np.float32)

        prefetcher = Prefetcher(self.images, lambda n: self.indices(n)[0], self._data)
        pipeline = eval_pipeline(
            source, self._batch_size, self._image_size, self._data, self._evaluation, self._device_id
        )
        outputs = _PipelineOutputs(pipeline, self.images, prefetcher, self._data, self._device_id)
        try:
            for _ in range(len(self)):
                yield outputs.next()
        finally:
            prefetcher.close()
            outputs.close()

    def read(self, indices: np.ndarray) -> EncodedBatch:
        """Read the images with these indices, at least one, without decoding. Raise DataError as a pass does."""
        prefetcher = Prefetcher(self.images, lambda n: indices[:0] if n else indices, self._data)
        try:
            return prefetcher.batch(0)
        finally:
            prefetcher.close()

    def indices(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset indices of this rank's part of the n-th batch, and a mask that is False for padding."""
        start = (n * self._dp_size + self._dp_rank) * self._batch_size
        indices = np.arange(start, start + self._batch_size)
        is_real = indices < len(self.images)
        return np.where(is_real, indices, 0), is_real


class _PipelineOutputs:
    """Pipeline outputs as Paddle tensors in DALI's memory, which is held until the device has read it."""

    def __init__(
        self, pipeline: Any, images: ImageDataset, prefetcher: Prefetcher, data: DataConfig, device_id: int | None
    ) -> None:
        self.seconds_waited = 0.0  # for the pipeline, not for the GPU
        self._pipeline = pipeline
        self._images, self._prefetcher = images, prefetcher
        self._device_id = device_id
        self._in_use: deque[tuple[Any, Any]] = deque()
        self._last: Any = None
        self._recent_indices: deque[np.ndarray] = deque(maxlen=data.prefetch_batches + 1)  # images DALI may be decoding
        self._read_error: DataError | None = None

    def close(self) -> None:
        """Release the pipeline.

        The pipeline and its source refer to each other, so its memory would otherwise be held until garbage collection.
        """
        self._pipeline = self._last = None
        self._in_use.clear()

    def read(self, n: int) -> EncodedBatch:
        """Return the n-th batch to the pipeline's source."""
        try:
            batch = self._prefetcher.batch(n)
        except DataError as error:
            self._read_error = error  # DALI may hide it in an error of its own
            raise
        self._recent_indices.append(batch.indices)
        return batch

    def next(self) -> Batch:
        if self._device_id is not None and self._last is not None:
            # The GPU may still be reading earlier batches. Work queued so far includes the last batch's step;
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
            raise self._identify_error(error) from None
        self.seconds_waited += time.perf_counter() - started
        return tuple(from_dlpack(output.as_tensor()) for output in self._last)

    def _identify_error(self, error: Exception) -> Exception:
        """Return the error to raise for a pipeline that failed.

        DALI doesn't always name the image, so the recent ones are decoded again, in another process, until one fails.
        """
        if self._read_error is not None:
            return self._read_error
        recent = list(dict.fromkeys(np.concatenate([np.empty(0, np.int64), *self._recent_indices]).tolist()))
        return next((problem for _, problem in undecodable(self._images, recent, self._device_id)), error)


def undecodable(
    images: ImageDataset, indices: Sequence[int], device_id: int | None = None
) -> Iterator[tuple[int, DataError]]:
    """Yield the images that can't be read or decoded: their indices, and the DataError that training raises for them.

    They are decoded in a process of their own, because training's has failed with one of them.
    """
    with DecoderProcess(1, device_id) as decoder:
        for start in range(0, len(indices), DECODING_BATCH_SIZE):
            readable: list[tuple[int, np.ndarray]] = []
            for index in indices[start : start + DECODING_BATCH_SIZE]:
                try:
                    readable.append((index, images.read(index)[0]))
                except DataError as error:
                    yield index, error
            reports = decoder.reports([encoded for _, encoded in readable])
            for (index, _), report in zip(readable, reports, strict=True):
                if report.fault is not None:
                    message = f"{images.message_name(index)}: {report.fault.reason}; repair or remove the file"
                    yield index, DataError(message, report.fault.kind)


def _label_array(batch: EncodedBatch, num_multi_hot: int | None) -> np.ndarray:
    """Return labels [B] int64, or [B, num_multi_hot] uint8 with 1 for the labels of an image and 0 for the others."""
    if num_multi_hot is None:
        return np.concatenate(batch.labels).astype(np.int64)
    multi_hot = np.zeros((len(batch.labels), num_multi_hot), np.uint8)
    for row, labels in zip(multi_hot, batch.labels, strict=True):
        row[labels] = 1
    return multi_hot
