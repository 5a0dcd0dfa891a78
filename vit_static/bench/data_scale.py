"""`bench data --scale`: what lists of ImageNet-1k's and ImageNet-21k's length cost, in time and in memory.

The lists are generated, with paths as long as the real ones; their images are a few photographs, again and again.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import psutil

from vit_static.bench.harness import check_writable, write_results
from vit_static.bench.photos import write_photos
from vit_static.checkpoint.progress import DataPosition
from vit_static.config.schema import Config, DataConfig
from vit_static.data.loader import TrainLoader
from vit_static.data.open_set import open_set
from vit_static.data.sampler import ShuffledSampler

SIZES = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 14_197_122}
NUM_CLASSES = 1000
FIRST_BATCH_TARGET_S = 10.0  # of ImageNet-1k, in a process that has just been started
_PATH_BYTES = 38  # train/n01440764/n01440764_10026.JPEG


@dataclass(frozen=True)
class Cost:
    """Of one list: seconds, and bytes."""

    list_s: float  # opening it
    first_batch_s: float  # after it
    from_start_s: float  # the first batch, from the start of a process
    shuffle_s: float  # of an epoch
    digest_s: float  # what a checkpoint tells the same set by, once a run
    position_s: float  # what a checkpoint keeps of the place
    resume_s: float  # the first batch in the midst of the third epoch
    list_bytes: int
    position_bytes: int
    anonymous_bytes: int  # the process's memory, but for the list itself, which the ranks of a machine share
    before_bytes: int  # that of the same process before it opened the list


def run(config: Config, json_path: Path | None) -> None:
    """Prints each list's costs, and how they grow; all that grows must grow no faster than the list."""
    check_writable(json_path)
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        print(write_photos(Path(folder)), flush=True)
        for name, num_images in SIZES.items():
            write_list(Path(folder), num_images)
            # A process of its own each: its memory is that of this list.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                costs[name] = process.submit(measure, Path(folder), num_images, config, time.time()).result()
    (name, small), (_, large) = costs.items()
    growth = SIZES["ImageNet-21k"] / SIZES["ImageNet-1k"]
    print(f"\n{'':<18}" + "".join(f"{f'{size:,} images':>22}" for size in SIZES.values()) + f"{'grows by':>10}")
    for field in fields(Cost):
        few, many = getattr(small, field.name), getattr(large, field.name)
        print(f"{field.name:<18}{_shown(field.name, few):>22}{_shown(field.name, many):>22}{many / few:10.1f}")
    added = [cost.anonymous_bytes - cost.before_bytes for cost in costs.values()]
    shown = [_shown("bytes", memory) for memory in added]
    print(f"{'added memory':<18}{shown[0]:>22}{shown[1]:>22}{added[1] / added[0]:10.1f}")
    print(f"the list grows by {growth:.1f}; the first batch of {name} has a target of {FIRST_BATCH_TARGET_S:.0f} s")
    if json_path is not None:
        write_results(json_path, {}, {}, {name: asdict(cost) for name, cost in costs.items()})


def measure(folder: Path, num_images: int, config: Config, started_at: float) -> Cost:
    """In a process that was started at `started_at` (time.time)."""
    before_bytes = _anonymous_bytes()
    data = DataConfig(root=str(folder), train="list.txt", global_batch_size=config.data.global_batch_size)
    batch_size = data.global_batch_size
    started = time.perf_counter()
    images = open_set(data, "train", NUM_CLASSES)
    list_s = time.perf_counter() - started

    def first_batch_s(start_step: int) -> float:
        started = time.perf_counter()
        feed = TrainLoader(
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
        next(feed)
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
    return Cost(
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
    """`list.txt` of so many lines, which name the folder's photographs by paths made longer with `./`."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.glob("train/*/*.jpeg"))]
    longer = [f"train/{'./' * ((_PATH_BYTES - len(name)) // 2)}{name.removeprefix('train/')}" for name in names]
    labels = np.random.default_rng(0).integers(NUM_CLASSES, size=num_images)
    with (folder / "list.txt").open("w") as file:
        for start in range(0, num_images, 1 << 16):
            part = enumerate(labels[start : start + (1 << 16)].tolist())
            file.writelines(f"{longer[n % len(longer)]} {label}\n" for n, label in part)


def _anonymous_bytes() -> int:
    """Return this process's resident memory without mapped files and shared memory."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def _shown(name: str, value: float) -> str:
    if not name.endswith("bytes"):
        return f"{value:.4f} s"
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value:.0f} bytes"
