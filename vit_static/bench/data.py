"""`bench data`: training images from DALI, PIL and torchvision, by stage and source; the time that training waits.

`--scale` measures lists of millions of images (data_scale.py), `--device gpu` a GPU against the CPU (data_gpu.py).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from nvidia import dali

from vit_static.bench.harness import (
    ROOT,
    Candidate,
    check_writable,
    config_spec,
    machine,
    machine_line,
    measure_interleaved,
    missing_packages,
    peer_candidate,
    peers_python,
    print_missing,
    print_ratios,
    print_table,
    ratio,
    worker_command,
    write_results,
)
from vit_static.bench.peers import protocol
from vit_static.bench.photos import NUM_PHOTO_CLASSES, write_photos
from vit_static.bench.step import MeasuredStep, make_train_loader
from vit_static.common import terminal
from vit_static.common.errors import ConfigError
from vit_static.common.text import counted, print_text
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_pipeline import train_pipeline
from vit_static.data.image_formats import IMAGE_SUFFIXES
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import open_set
from vit_static.data.prefetch import Prefetcher
from vit_static.data.sampler import ShuffledSampler
from vit_static.model.variants import model_name
from vit_static.parallel.mesh import MeshShape, choose_device, start_mesh

PEERS = {"pil": ("PIL", "pil_data.py", "PIL"), "torchvision": ("torchvision", "torchvision_data.py", "torchvision")}
_TARGET = 1.0  # of the speed against each peer's
_WARM_UP_BATCHES = 8

Stage = Literal["read", "decode", "resize", "augment", "normalise"]
LoadBatch = Callable[[], int]  # loads a batch, returns its number of images


def run(
    config: Config,
    config_path: Path,
    overrides: Sequence[str],
    num_rounds: int,
    seconds: float,
    json_path: Path | None,
    peers: Sequence[str] = tuple(PEERS),
    peer_python: Path | None = None,
) -> None:
    """Print speeds, their ratios, and the share of the time that training waits for images.

    The images are those of data.root. If that folder doesn't exist and no override names it, photographs generated for
    this run are used. Raise ConfigError for a config that PIL can't follow.
    """
    check_writable(json_path)
    print_text(machine_line(machine(["uint8 pixels"])), flush=True)
    if choose_device(config.device) == "gpu":
        raise ConfigError(
            "bench data: PIL doesn't run on GPUs; set -o device=cpu, or measure only DALI with --device gpu"
        )
    if not config.augment.antialias:
        raise ConfigError("bench data: PIL always antialiases; set -o augment.antialias=true")
    with tempfile.TemporaryDirectory() as folder:
        all_overrides = [f"data.num_threads={num_cores()}", *overrides]
        names_root = any(override.startswith("data.root=") for override in overrides)
        photos = Path(folder) / "photos"
        print_text(write_photos(photos), flush=True)
        if not names_root and not Path(config.data.root).is_dir():
            all_overrides += [f"data.root={photos}", f"model.num_classes={NUM_PHOTO_CLASSES}"]
        config = load_config(config_path, all_overrides)
        images = open_set(config.data, "train", config.model.num_classes)
        print_text(f"images of {config.data.root}\n", flush=True)
        python = peers_python(peer_python)
        absent = missing_packages(python, [PEERS[peer][2] for peer in peers])
        present = [peer for peer in peers if PEERS[peer][2] not in absent]
        results = measure_interleaved(make_candidates(config, present, python), num_rounds, seconds)
        ratios = {
            f"dali_vs_{peer}_{cores}_cores": ratio(results[f"dali_{cores}"], results[f"{peer}_{cores}"])
            for cores in core_counts()
            for peer in present
        }
        print_table(results, num_rounds)
        print_missing(
            {PEERS[peer][0]: PEERS[peer][0].replace("PIL", "pillow") for peer in peers if peer not in present}
        )
        print_text("(peak memory of the peers: without their worker processes)")
        print_ratios(ratios, dict.fromkeys(ratios, _TARGET))
        augmented = with_augmentation(config)
        stages = {n: measure_stages(augmented, images, n, num_rounds, seconds / 4) for n in core_counts()}
        print_stages(stages, augmented)
        sources = measure_sources(config, photos, num_rounds, seconds / 4)
        data_wait, train_speed = measure_data_wait(config, num_rounds * seconds)
    dali_speed = results[f"dali_{num_cores()}"].median
    print_text(
        f"\ntraining {model_name(config.model)}, batch {config.data.global_batch_size}: {train_speed:.1f} images/s, "
        f"{train_speed / dali_speed:.1%} of the speed of DALI on {counted(num_cores(), 'core')}; "
        f"data_wait {data_wait:.2%}"
    )
    others: dict[str, Any] = {
        "data_wait": data_wait,
        "share_needed": train_speed / dali_speed,
        "stages": stages,
        "sources": sources,
    }
    write_results(json_path, ratios, results, others)


def core_counts() -> list[int]:
    """Return the numbers of cores to measure with: one, and all."""
    return sorted({1, num_cores()})


def make_candidates(config: Config, peers: Sequence[str], python: str) -> list[Candidate]:
    """Return training's DALI pipeline and the peers' same operations, each on one core and on all cores."""
    candidates = []
    for cores in core_counts():
        ours = config.model_copy(update={"data": config.data.model_copy(update={"num_threads": cores})})
        augment = config.augment.model_dump(
            include={"crop_scale", "crop_aspect_ratio", "interpolation", "flip_probability"}
        )
        spec = {
            "folder": str(Path(config.data.root) / config.data.train),
            "suffixes": sorted(IMAGE_SUFFIXES),
            "batch_size": config.data.global_batch_size,
            "image_size": config.model.image_size,
            **augment,
            "mean": config.data.mean,
            "std": config.data.std,
            "num_processes": cores,
            "seed": config.seed,
        }
        suffix = f"{cores} core{'s' if cores > 1 else ''},"
        command = worker_command("data", config_spec(ours))
        candidates.append(Candidate(f"dali_{cores}", f"vit_static, {suffix} DALI", command, num_cores=cores))
        for peer in peers:
            title, script, _ = PEERS[peer]
            candidates.append(peer_candidate(f"{peer}_{cores}", f"{title}, {suffix}", python, script, spec, cores))
    return candidates


def serve(config: Config) -> None:
    """Load training batches, as a worker of the harness."""
    load_batch = train_batches(config)
    for _ in range(_WARM_UP_BATCHES):
        load_batch()
    protocol.serve(load_batch, version=dali.__version__)


def train_batches(config: Config) -> LoadBatch:
    """Return a function that loads the next batch as the training loop does."""
    loader = make_train_loader(config, start_mesh(MeshShape(1, 1, 1), "cpu"))

    def load_batch() -> int:
        images, _ = next(loader)
        return len(images)

    return load_batch


def with_augmentation(config: Config) -> Config:
    """Return the config, with RandAugment if it has no policy, so that the augmentation stage can be measured."""
    if config.augment.policy != "none":
        return config
    return config.model_copy(update={"augment": config.augment.model_copy(update={"policy": "randaugment"})})


def measure_stages(
    config: Config, images: ImageDataset, num_threads: int, num_rounds: int, seconds: float
) -> dict[str, float]:
    """Return the images per second of pipelines that end with each stage: medians of the rounds."""
    data = config.data.model_copy(update={"num_threads": num_threads})
    config = config.model_copy(update={"data": data})
    pipelines = {stage: stage_batches(config, images, stage) for stage in get_args(Stage)}
    return median_speeds(pipelines, num_rounds, seconds)


def stage_batches(config: Config, images: ImageDataset, last_stage: Stage) -> LoadBatch:
    """Return a function that runs a CPU pipeline that ends with `last_stage`, batch by batch."""
    augment, batch_size, image_size = config.augment, config.data.global_batch_size, config.model.image_size
    sampler = ShuffledSampler(len(images), config.seed, augment.repeated_aug)
    prefetcher = Prefetcher(images, lambda n: sampler.indices(n * batch_size, (n + 1) * batch_size), config.data)
    num_draws = num_draws_per_image(augment)
    if last_stage == "read":
        numbers = iter(range(1 << 62))
        return lambda: len(prefetcher.batch(next(numbers)).encoded)

    def source(n: int) -> tuple[Any, ...]:
        positions = n * batch_size, (n + 1) * batch_size
        draws = sampler.augmentation_draws(*positions, num_draws) if num_draws else None
        values = () if draws is None else op_parameters(draws, augment, image_size).values()
        return prefetcher.batch(n).encoded, np.zeros(batch_size, np.int64), sampler.crop_flip_draws(*positions), *values

    data = config.data.model_copy(update={"multi_label": False})  # labels don't matter here
    pipeline = train_pipeline(source, batch_size, image_size, data, augment, None, last_stage)

    def load_batch() -> int:
        return len(pipeline.run()[0])

    return load_batch


def print_stages(speeds_by_threads: Mapping[int, Mapping[str, float]], config: Config) -> None:
    """Print the speed up to each stage, and the time that the stage adds per image, by number of threads."""
    heads = [
        head for number in speeds_by_threads for head in (f"{counted(number, 'thread')}, images/s", "ms per image")
    ]
    rows = []
    for index, stage in enumerate(get_args(Stage)):
        row = [stage]
        for speeds in speeds_by_threads.values():
            # Files are read in the background: the decoding pipeline doesn't wait for them.
            before_ms = 0.0 if index < 2 else 1e3 / speeds[get_args(Stage)[index - 1]]
            row += [f"{speeds[stage]:.1f}", f"{1e3 / speeds[stage] - before_ms:.3f}"]
        rows.append(row)
    print_text("")
    terminal.print_table(["up to this stage", *heads], rows, right=range(1, 1 + len(heads)))
    print_text(
        "(ms per image: what the stage adds; files are read in the background; augmentation policy: "
        f"{config.augment.policy})"
    )


def measure_sources(config: Config, photos: Path, num_rounds: int, seconds: float) -> dict[str, float]:
    """Return and print the images per second of the same photographs in class folders, in a list and in shards."""
    pack = [sys.executable, "-m", "vit_static", "data", "shards", "--root", str(photos), "--out"]
    subprocess.run([*pack, str(photos / "shards")], check=True, capture_output=True, cwd=ROOT)
    folders = open_set(config.data.model_copy(update={"root": str(photos)}), "train", NUM_PHOTO_CLASSES)
    lines = [f"{folders.name(n)} {folders.read(n)[1][0]}\n" for n in range(len(folders))]
    (photos / "list.txt").write_text("".join(lines))
    sources = {}
    for name, train in {"class folders": "train", "list file": "list.txt", "shards": "shards/train"}.items():
        data = config.data.model_copy(update={"root": str(photos), "train": train})
        model = config.model.model_copy(update={"num_classes": NUM_PHOTO_CLASSES})
        sources[name] = train_batches(config.model_copy(update={"data": data, "model": model}))
    speeds = median_speeds(sources, num_rounds, seconds)
    print_text("")
    terminal.print_table(("source", "images/s"), [(name, f"{speed:.1f}") for name, speed in speeds.items()], right=(1,))
    return speeds


def median_speeds(pipelines: Mapping[str, LoadBatch], num_rounds: int, seconds: float) -> dict[str, float]:
    """Measure the pipelines in interleaved rounds; return the median images per second of each."""
    for load_batch in pipelines.values():
        for _ in range(_WARM_UP_BATCHES):
            load_batch()
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(num_rounds):
        for name, load_batch in pipelines.items():
            started, num_images = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - started) < seconds:
                num_images += load_batch()
            speeds[name].append(num_images / elapsed)
    return {name: statistics.median(rounds) for name, rounds in speeds.items()}


def measure_data_wait(config: Config, seconds: float) -> tuple[float, float]:
    """Train for `seconds`; return the share of the time that training waits for DALI (0-1), and its images per second.

    The first steps, which warm up, don't count.
    """
    step = MeasuredStep(config, real_data=True)
    assert step.loader is not None
    waited_before, num_images, started = step.loader.seconds_waited, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        num_images += step()
    return (step.loader.seconds_waited - waited_before) / elapsed, num_images / elapsed


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
