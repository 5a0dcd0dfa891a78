"""`bench data`: DALI's training images against PIL's, by stage, by source; how long training waits for them.

`--scale` (data_scale.py) measures lists of millions, `--device gpu` (data_cards.py) a card.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from nvidia import dali

from vit_static.bench.harness import (
    ROOT,
    Contender,
    check_writable,
    config_spec,
    our_python,
    peer,
    peers_python,
    print_ratios,
    print_table,
    ratio,
    run_in_turns,
    worker_command,
    write_results,
)
from vit_static.bench.peers import protocol
from vit_static.bench.photos import NUM_PHOTO_CLASSES, write_photos
from vit_static.bench.step import MeasuredStep, feed_of
from vit_static.common.errors import ConfigError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.augment import num_draws_per_image, op_parameters
from vit_static.data.dali_pipeline import train_pipeline
from vit_static.data.image_set import IMAGE_SUFFIXES, ImageDataset
from vit_static.data.open_set import open_set
from vit_static.data.prefetch import Prefetcher
from vit_static.data.sampler import ShuffledSampler
from vit_static.parallel.mesh import MeshShape, choose_device, start_mesh

TARGETS = {"dali_vs_pil": 1.0}
_WARM_UP_BATCHES = 8

Stage = Literal["read", "decode", "resize", "augment", "normalise"]
Work = Callable[[], int]  # does a batch, returns its number of images


def run(
    config: Config, config_path: Path, overrides: Sequence[str], rounds: int, seconds: float, json_path: Path | None
) -> None:
    """Prints images a second and ratios, and the share of its time that training waits for images.

    The images are those of data.root; where no override names it and there is none, photographs made for the occasion.
    """
    check_writable(json_path)
    if choose_device(config.device) == "gpu":
        raise ConfigError("bench data: PIL has no card; set device=cpu, or measure the card alone with --device gpu")
    if not config.augment.antialias:
        raise ConfigError("bench data: PIL always antialiases; set augment.antialias=true")
    with tempfile.TemporaryDirectory() as folder:
        changed = [f"data.num_threads={num_cores()}", *overrides]
        is_named = any(override.startswith("data.root=") for override in overrides)
        photographs = Path(folder) / "photographs"
        print(f"{write_photos(photographs)}", flush=True)
        if not is_named and not Path(config.data.root).is_dir():
            changed += [f"data.root={photographs}", f"model.num_classes={NUM_PHOTO_CLASSES}"]
        config = load_config(config_path, changed)
        images = open_set(config.data, "train", config.model.num_classes)
        print(f"images of {config.data.root}\n", flush=True)
        results = run_in_turns(contenders_for(config), rounds, seconds)
        ratios = {
            f"dali_vs_pil_{cores}_cores": ratio(results[f"dali_{cores}"], results[f"pil_{cores}"])
            for cores in core_counts()
        }
        print_table(results, rounds)
        print("(memory: PIL's without its worker processes)")
        print_ratios(ratios, dict.fromkeys(ratios, TARGETS["dali_vs_pil"]))
        augmented = with_a_policy(config)
        stages = {threads: by_stage(augmented, images, threads, rounds, seconds / 4) for threads in core_counts()}
        print_stages(stages, augmented)
        sources = by_source(config, photographs, rounds, seconds / 4)
        waited, step_speed = data_wait(config, rounds * seconds)
    fed = results[f"dali_{num_cores()}"].median
    print(
        f"\ntraining {config.model.variant}, batch {config.data.global_batch_size}: {step_speed:.1f} images/s, "
        f"{step_speed / fed:.1%} of what DALI gives on {num_cores()} cores; data_wait {waited:.2%}"
    )
    others: dict[str, Any] = {
        "data_wait": waited,
        "share_needed": step_speed / fed,
        "stages": stages,
        "sources": sources,
    }
    write_results(json_path, ratios, results, others)


def core_counts() -> list[int]:
    """One core, and all of them."""
    return sorted({1, num_cores()})


def contenders_for(config: Config) -> list[Contender]:
    """DALI's pipeline as training has it, and the same operations by PIL, on as many cores: on one, and on all."""
    found = []
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
        of = f"{cores} core{'s' if cores > 1 else ''},"
        found += [
            Contender(
                f"dali_{cores}", f"vit_static, {of} DALI", worker_command("data", config_spec(ours)), cores=cores
            ),
            peer(f"pil_{cores}", f"PIL, {of}", peers_python(), "pil_data.py", spec, cores=cores),
        ]
    return found


def serve(config: Config) -> None:
    """Load training batches, as a worker of the harness."""
    batch = fed_batches(config)
    for _ in range(_WARM_UP_BATCHES):
        batch()
    protocol.serve(batch, version=dali.__version__)


def fed_batches(config: Config) -> Work:
    """Training's batches, as the training loop gets them."""
    feed = feed_of(config, start_mesh(MeshShape(1, 1, 1), "cpu"))

    def batch() -> int:
        images, _ = next(feed)
        return len(images)

    return batch


def with_a_policy(config: Config) -> Config:
    """The config; where its augmentation ends with the crop, with RandAugment, so that there is a stage to measure."""
    if config.augment.policy != "none":
        return config
    return config.model_copy(update={"augment": config.augment.model_copy(update={"policy": "randaugment"})})


def by_stage(config: Config, images: ImageDataset, num_threads: int, rounds: int, seconds: float) -> dict[str, float]:
    """Images a second of the pipeline up to each stage, the median of the rounds."""
    data = config.data.model_copy(update={"num_threads": num_threads})
    works = {stage: stage_work(config.model_copy(update={"data": data}), images, stage) for stage in get_args(Stage)}
    return medians_in_turns(works, rounds, seconds)


def stage_work(config: Config, images: ImageDataset, last_stage: Stage) -> Work:
    """A pipeline that ends with a stage, on the CPU."""
    augment, batch_size, image_size = config.augment, config.data.global_batch_size, config.model.image_size
    order = ShuffledSampler(len(images), config.seed, augment.repeated_aug)
    reader = Prefetcher(images, lambda n: order.indices(n * batch_size, (n + 1) * batch_size), config.data)
    num_draws = num_draws_per_image(augment)
    if last_stage == "read":
        numbers = iter(range(1 << 62))
        return lambda: len(reader.batch(next(numbers)).encoded)

    def source(n: int) -> tuple[Any, ...]:
        positions = n * batch_size, (n + 1) * batch_size
        draws = order.augmentation_draws(*positions, num_draws) if num_draws else None
        values = () if draws is None else op_parameters(draws, augment, image_size).values()
        return reader.batch(n).encoded, np.zeros(batch_size, np.int64), order.crop_flip_draws(*positions), *values

    data = config.data.model_copy(update={"multi_label": False})  # labels don't matter here
    pipeline = train_pipeline(source, batch_size, image_size, data, augment, None, last_stage)

    def batch() -> int:
        return len(pipeline.run()[0])

    return batch


def print_stages(stages: Mapping[int, Mapping[str, float]], config: Config) -> None:
    titles = [f"{f'{threads} thread(s), images/s':>26}{'ms an image':>14}" for threads in stages]
    print(f"\n{'up to and with':<22}" + "".join(titles))
    for index, stage in enumerate(get_args(Stage)):
        line = f"{stage:<22}"
        for speeds in stages.values():
            before = 0.0 if index < 2 else 1e3 / speeds[get_args(Stage)[index - 1]]
            line += f"{speeds[stage]:26.1f}{1e3 / speeds[stage] - before:14.3f}"
        print(line)
    print(f"(a stage's own time is what it adds; files are read beside the rest; augment: {config.augment.policy})")


def by_source(config: Config, photographs: Path, rounds: int, seconds: float) -> dict[str, float]:
    """Images a second from class folders, a list and shards of the same photographs; prints them."""
    pack = [our_python(), "-m", "data_tools", "shards", "--root", str(photographs), "--out"]
    subprocess.run([*pack, str(photographs / "shards")], check=True, capture_output=True, cwd=ROOT)
    folders = open_set(config.data.model_copy(update={"root": str(photographs)}), "train", NUM_PHOTO_CLASSES)
    lines = [f"{folders.name(n)} {folders.read(n)[1][0]}\n" for n in range(len(folders))]
    (photographs / "list.txt").write_text("".join(lines))
    works = {}
    for name, train in {"class folders": "train", "list file": "list.txt", "shards": "shards/train"}.items():
        data = config.data.model_copy(update={"root": str(photographs), "train": train})
        model = config.model.model_copy(update={"num_classes": NUM_PHOTO_CLASSES})
        works[name] = fed_batches(config.model_copy(update={"data": data, "model": model}))
    speeds = medians_in_turns(works, rounds, seconds)
    print(f"\n{'source':<22}{'images/s':>10}")
    for name, speed in speeds.items():
        print(f"{name:<22}{speed:10.1f}")
    return speeds


def medians_in_turns(works: Mapping[str, Work], rounds: int, seconds: float) -> dict[str, float]:
    """Images a second of each, which take turns: the medians of the rounds."""
    for work in works.values():
        for _ in range(_WARM_UP_BATCHES):
            work()
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started, num_images = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - started) < seconds:
                num_images += work()
            speeds[name].append(num_images / elapsed)
    return {name: statistics.median(found) for name, found in speeds.items()}


def data_wait(config: Config, seconds: float) -> tuple[float, float]:
    """The share of its time that the training loop waits for DALI, 0 to 1, after a few steps, over `seconds`; and
    training's images a second."""
    step = MeasuredStep(config, real_data=True)
    assert step.feed is not None
    waited, num_images, started = step.feed.seconds_waited, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        num_images += step()
    return (step.feed.seconds_waited - waited) / elapsed, num_images / elapsed


def num_cores() -> int:
    return len(os.sched_getaffinity(0))
