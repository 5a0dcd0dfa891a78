"""`bench data --scale`: time and memory for image lists as long as those of ImageNet-1k and ImageNet-21k.

The lists are generated, with paths as long as the real ones, and name a few photographs again and again.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from vit_static.bench.harness import check_writable, write_results
from vit_static.bench.photos import write_photos
from vit_static.checkpoint.progress import DataPosition
from vit_static.common.terminal import print_table
from vit_static.common.text import print_text
from vit_static.config.data_schema import DataConfig
from vit_static.config.schema import Config
from vit_static.data.loader import TrainLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import ShuffledSampler

SIZES = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 14_197_122}
NUM_CLASSES = 1000
FIRST_BATCH_TARGET_S = 10.0  # for ImageNet-1k, since the start of the process
_PATH_BYTES = 38  # train/n01440764/n01440764_10026.JPEG


@dataclass(frozen=True)
class ListCost:
    """Time in seconds and memory in bytes for one list."""

    list_s: float  # to open the list
    first_batch_s: float  # to load the first batch after that
    from_start_s: float  # from the start of the process to the first batch
    shuffle_s: float  # to shuffle an epoch
    digest_s: float  # to compute the digest by which a checkpoint identifies the data set, once per run
    position_s: float  # to serialise the data position for a checkpoint
    resume_s: float  # to load the first batch when resuming in the middle of the third epoch
    list_bytes: int  # size of the file
    position_bytes: int  # size of the data position in a checkpoint
    anonymous_bytes: int  # memory of the process, without the list itself, which the ranks of a machine share
    before_bytes: int  # the same before the list was opened


def run(config: Config, json_path: Path | None) -> None:
    """Print the costs of both lists and the ratio of each; no cost should grow faster than the list."""
    check_writable(json_path)
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        print_text(write_photos(Path(folder)), flush=True)
        for name, num_images in SIZES.items():
            write_list(Path(folder), num_images)
            # In a new process, so that its memory is that of this list only.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                costs[name] = process.submit(measure, Path(folder), num_images, config, time.time()).result()
    (name, small), (_, large) = costs.items()
    growth = SIZES["ImageNet-21k"] / SIZES["ImageNet-1k"]
    rows = []
    for field in fields(ListCost):
        unit: Literal["s", "bytes"] = "bytes" if field.name.endswith("_bytes") else "s"
        rows.append(_row(field.name, getattr(small, field.name), getattr(large, field.name), unit))
    added_small, added_large = (cost.anonymous_bytes - cost.before_bytes for cost in (small, large))
    rows.append(_row("added memory", added_small, added_large, "bytes"))
    print_text("")
    print_table(["cost", *(f"{size:,} images" for size in SIZES.values()), "ratio"], rows, right=(1, 2, 3))
    print_text(f"ratio of the lengths: {growth:.1f}; target for from_start_s of {name}: {FIRST_BATCH_TARGET_S:.0f} s")
    if json_path is not None:
        write_results(json_path, {}, {}, {name: asdict(cost) for name, cost in costs.items()})


def measure(folder: Path, num_images: int, config: Config, started_at: float) -> ListCost:
    """Measure list.txt of `folder` in this process, which was started at `started_at` (time.time)."""
    before_bytes = _anonymous_bytes()
    data = DataConfig(root=str(folder), train="list.txt", global_batch_size=config.data.global_batch_size)
    batch_size = data.global_batch_size
    started = time.perf_counter()
    images = open_set(data, "train", NUM_CLASSES)
    list_s = time.perf_counter() - started

    def first_batch_s(start_step: int) -> float:
        started = time.perf_counter()
        loader = TrainLoader(
            images,
            config.model.image_size,
            data,
            config.augment,
            seed=config.seed,
            start_step=start_step,
            dp_rank=0,
            dp_size=1,
            device_id=None,
        )
        next(loader)
        return time.perf_counter() - started

    first_s = first_batch_s(0)
    from_start_s = time.time() - started_at
    anonymous_bytes = _anonymous_bytes()
    started = time.perf_counter()
    ShuffledSampler(len(images), config.seed).indices(0, batch_size)
    shuffle_s = time.perf_counter() - started
    started = time.perf_counter()
    digest = images.digest()
    digest_s = time.perf_counter() - started
    started = time.perf_counter()
    position = json.dumps(asdict(DataPosition(12_345 * batch_size, num_images, digest, config.seed, repeated_aug=1)))
    position_s = time.perf_counter() - started
    return ListCost(
        list_s=list_s,
        first_batch_s=first_s,
        from_start_s=from_start_s,
        shuffle_s=shuffle_s,
        digest_s=digest_s,
        position_s=position_s,
        resume_s=first_batch_s(int(2.5 * num_images / batch_size)),
        list_bytes=(folder / "list.txt").stat().st_size,
        position_bytes=len(position),
        anonymous_bytes=anonymous_bytes,
        before_bytes=before_bytes,
    )


def write_list(folder: Path, num_images: int) -> None:
    """Write list.txt with `num_images` lines, which name the folder's photographs by paths lengthened with `./`."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.glob("train/*/*.jpeg"))]
    paths = [f"train/{'./' * ((_PATH_BYTES - len(name)) // 2)}{name.removeprefix('train/')}" for name in names]
    labels = np.random.default_rng(0).integers(NUM_CLASSES, size=num_images)
    with (folder / "list.txt").open("w") as file:
        for start in range(0, num_images, 1 << 16):
            chunk = enumerate(labels[start : start + (1 << 16)].tolist())
            file.writelines(f"{paths[n % len(paths)]} {label}\n" for n, label in chunk)


def _anonymous_bytes() -> int:
    """Return this process's resident memory without mapped files and shared memory."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def _row(name: str, small: float, large: float, unit: Literal["s", "bytes"]) -> tuple[str, ...]:
    return name, _formatted(small, unit), _formatted(large, unit), f"{large / small:.1f}"


def _formatted(value: float, unit: Literal["s", "bytes"]) -> str:
    if unit == "s":
        return f"{value:.4f} s"
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value:.0f} bytes"
