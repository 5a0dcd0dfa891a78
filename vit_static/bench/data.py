"""`bench data`: DALI's training images against PIL's, and how much of its time training waits for them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nvidia import dali
from PIL import Image

from vit_static import mesh as mesh_module
from vit_static.bench.contenders import (
    Contender,
    check_writable,
    our_python,
    peer,
    peers_python,
    print_ratios,
    print_table,
    ratio,
    take_turns,
    write_json,
)
from vit_static.bench.peers import protocol
from vit_static.bench.step import MeasuredStep, feed_of
from vit_static.config import Config, ConfigError, UserError, load
from vit_static.data.images import IMAGE_SUFFIXES, list_images

TARGETS = {"dali_vs_pil": 1.0}
NUM_PHOTOGRAPHS, NUM_PHOTOGRAPH_CLASSES = 256, 2
PHOTOGRAPH_SIZE, JPEG_QUALITY = (500, 375), 97  # ImageNet's commonest width and height; files of 95 kB
_WARM_UP_BATCHES = 8


def run(
    config: Config, config_path: Path, overrides: Sequence[str], rounds: int, seconds: float, json_path: Path | None
) -> None:
    """Prints images a second and their ratio, then the share of its time that training waits for images.

    The images are those of data.root; where no override names it and there is none, photographs made for the occasion.
    """
    check_writable(json_path)
    if mesh_module.choose_device(config.device) == "gpu":
        raise ConfigError("bench data: PIL has no card; set device=cpu")
    if not config.augment.antialias:
        raise ConfigError("bench data: PIL always antialiases; set augment.antialias=true")
    with contextlib.ExitStack() as stack:
        changed = [f"data.num_threads={_num_cores()}", *overrides]
        is_named = any(override.startswith("data.root=") for override in overrides)
        if not is_named and not Path(config.data.root).is_dir():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            print(f"no {config.data.root}: {write_photographs(Path(folder))}", flush=True)
            changed += [f"data.root={folder}", f"model.num_classes={NUM_PHOTOGRAPH_CLASSES}"]
        config = load(config_path, changed)
        list_images(config.data, "train", config.model.num_classes)
        results = take_turns(contenders_for(config, config_path, changed), rounds, seconds)
        ratios = {"dali_vs_pil": ratio(results["dali"], results["pil"])}
        print_table(results, rounds)
        print("(memory: PIL's without its worker processes)")
        print_ratios(ratios, TARGETS)
        waited = data_wait(config, rounds * seconds)
    print(f"\ntraining {config.model.variant}, batch {config.data.global_batch_size}: data_wait {waited:.2%}")
    write_json(json_path, ratios, results, {"data_wait": waited})


def contenders_for(config: Config, config_path: Path, overrides: Sequence[str]) -> list[Contender]:
    """DALI's pipeline as training has it, and the same operations by PIL, on as many cores."""
    given = [argument for override in overrides for argument in ("-o", override)]
    ours = (our_python(), "-m", "vit_static", "bench", "data", "--serve", "-c", str(config_path), *given)
    augment = config.augment.model_dump(include={"crop_area", "crop_aspect", "interpolation", "flip_probability"})
    spec = {
        "folder": str(Path(config.data.root) / "train"),
        "suffixes": sorted(IMAGE_SUFFIXES),
        "batch_size": config.data.global_batch_size,
        "image_size": config.model.image_size,
        **augment,
        "mean": config.data.mean,
        "std": config.data.std,
        "num_processes": _num_cores(),
        "seed": config.seed,
    }
    pil_title = f"PIL, {_num_cores()} processes,"
    return [
        Contender("dali", "vit_static, DALI", ours),
        peer("pil", pil_title, peers_python(), "pil_data.py", spec),
    ]


def serve(config: Config) -> None:
    """`bench data --serve`: training's images, as a contender of bench/contenders.py."""
    feed = feed_of(config, mesh_module.start(mesh_module.Sizes(1, 1, 1), "cpu"))

    def batch() -> int:
        images, _ = next(feed)
        return len(images)

    for _ in range(_WARM_UP_BATCHES):
        batch()
    protocol.serve(batch, version=dali.__version__)


def data_wait(config: Config, seconds: float) -> float:
    """The share of its time that the training loop waits for DALI, 0 to 1, after a few steps, over `seconds`."""
    step = MeasuredStep(config, fed=True)
    assert step.feed is not None
    waited, started = step.feed.seconds_waited, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        step()
    return (step.feed.seconds_waited - waited) / elapsed


def write_photographs(root: Path) -> str:
    """A training set of crops from scikit-learn's two sample photographs, a class each; returns what it is."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError(
            f"bench data: no images in data.root, and no scikit-learn to make some of ({our_python()} -m pip install "
            "scikit-learn); name a folder with -o data.root=ROOT"
        ) from None
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 wide, 427 high
    width, height = PHOTOGRAPH_SIZE
    rng = np.random.default_rng(0)
    num_bytes = 0
    for number in range(NUM_PHOTOGRAPHS):
        label = number % NUM_PHOTOGRAPH_CLASSES
        photograph = photographs[label]
        crop_height = int(photograph.height * rng.uniform(0.75, 1.0))
        crop_width = crop_height * width // height
        left = int(rng.integers(photograph.width - crop_width + 1))
        upper = int(rng.integers(photograph.height - crop_height + 1))
        image = photograph.crop((left, upper, left + crop_width, upper + crop_height))
        image = image.resize(PHOTOGRAPH_SIZE, Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = root / "train" / str(label) / f"{number:04d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=JPEG_QUALITY)
        num_bytes += path.stat().st_size
    kilobytes = num_bytes / NUM_PHOTOGRAPHS / 1e3
    return f"{NUM_PHOTOGRAPHS} JPEG files of {width}x{height} pixels, {kilobytes:.0f} kB each, made for this run"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
