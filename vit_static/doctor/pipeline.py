"""Check of the data pipeline: one batch with the config's own augmentation, and its speed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vit_static.bench.data_gpu import MAX_MEAN_DIFFERENCE
from vit_static.bench.photos import NUM_PHOTO_CLASSES, write_photos
from vit_static.common.text import counted
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.loader import TrainLoader
from vit_static.data.open_set import open_set
from vit_static.doctor.check import Result, failed, ok
from vit_static.doctor.subject import Subject

MAX_BATCH_SIZE = 64
_NUM_PHOTOS = 64
_SECONDS = 2.0  # of the measurement of the speed


def check_data(subject: Subject) -> Result:
    """One batch has the same pixels again: on a GPU as on the CPU, on a CPU with one thread to the same bits.

    The images are those of data.root, or generated photographs where there is no such folder.
    """
    config = subject.config
    size = min(MAX_BATCH_SIZE, max(config.data.global_batch_size // subject.mesh_shape.dp, 1))
    data = config.data.model_copy(update={"global_batch_size": size})
    with _images(subject) as (images, where):
        loader = _loader(subject, images, data, subject.device_id)
        batch = next(loader)[0].numpy()
        one_thread = data.model_copy(update={"num_threads": 1})
        expected = next(_loader(subject, images, one_thread, None))[0].numpy()
        levels = 255.0 * np.abs(batch - expected) * np.asarray(data.std, np.float32).reshape(1, -1, 1, 1)
        started, num_images = time.perf_counter(), 0
        while (seconds := time.perf_counter() - started) < _SECONDS:
            num_images += len(next(loader)[0])
    worst, speed = float(levels.mean(axis=(1, 2, 3)).max()), num_images / seconds
    figures = {"images_per_s": speed, "max_mean_difference": worst, "batch_size": size}
    if not np.isfinite(batch).all():
        return failed("pixels aren't finite", **figures)
    allowed = MAX_MEAN_DIFFERENCE if subject.on_gpu else 0.0
    if not worst <= allowed:
        other = (
            "on the GPU and on the CPU"
            if subject.on_gpu
            else f"with {counted(data.num_threads, 'thread')} and with one"
        )
        return failed(
            f"the pixels of an image differ by {worst:.2f} of 255 grey levels on average {other}; {allowed:g} is "
            "allowed",
            **figures,
        )
    difference = f"within {worst:.2f} grey levels of the CPU's" if subject.on_gpu else "the same bits with one thread"
    return ok(f"{counted(size, 'image')} {where}, {difference}; {speed:.0f} images/s", **figures)


@contextmanager
def _images(subject: Subject) -> Iterator[tuple[ImageDataset, str]]:
    """Yield the training images, and where they are. Raises DataError for a data set that can't be used."""
    data = subject.config.data
    if Path(data.root).exists():
        yield open_set(data, "train", subject.config.model.num_classes), f"of {data.root}"
        return
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), _NUM_PHOTOS)
        generated = DataConfig(root=folder)
        yield open_set(generated, "train", NUM_PHOTO_CLASSES), f"(generated: there is no {data.root})"


def _loader(subject: Subject, images: ImageDataset, data: DataConfig, device_id: int | None) -> TrainLoader:
    return TrainLoader(
        images,
        subject.image_size,
        data,
        subject.config.augment,
        seed=subject.config.seed,
        start_step=0,
        dp_rank=0,
        dp_size=1,
        device_id=device_id,
    )
