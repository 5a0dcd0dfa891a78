"""Training images by PIL, as torchvision's transforms and torch's DataLoader make them: whole images decoded, a random
crop cut out and resized, flipped, normalised; worker processes that fill batches in shared memory.

`python pil_data.py SPEC`, SPEC as bench/data.py writes it, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from protocol import serve

NUM_CROP_ATTEMPTS = 10
BATCHES_A_WORKER = 2  # on their way at a time: DataLoader's prefetch_factor
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Box = tuple[int, int, int, int]  # left, upper, right, lower


def random_crop(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """RandomResizedCrop's box: a share of the area, an aspect ratio (uniform in its logarithm), a place; if none of ten
    fits, the largest centred one within the aspect ratios."""
    for _ in range(NUM_CROP_ATTEMPTS):
        wanted_area = width * height * rng.uniform(*area)
        wanted_aspect = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        crop_width = round(math.sqrt(wanted_area * wanted_aspect))
        crop_height = round(math.sqrt(wanted_area / wanted_aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            upper = int(rng.integers(height - crop_height + 1))
            return left, upper, left + crop_width, upper + crop_height
    crop_width = min(width, round(height * aspect[1]))
    crop_height = min(height, round(width / aspect[0]))
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def load(path: str, spec: dict[str, Any], rng: np.random.Generator, out: np.ndarray) -> None:
    """One training image into `out`, [3, height, width] float32."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image = image.crop(random_crop(*image.size, spec["crop_scale"], spec["crop_aspect_ratio"], rng))
    height, width = spec["image_size"]
    image = image.resize((width, height), INTERPOLATIONS[spec["interpolation"]])
    if rng.random() < spec["flip_probability"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mean, std = (255.0 * np.asarray(spec[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    np.subtract(np.asarray(image).transpose(2, 0, 1), mean, out=out)
    out /= std


def find_images(spec: dict[str, Any]) -> list[str]:
    return sorted(str(path) for path in Path(spec["folder"]).glob("*/*") if path.suffix.lower() in spec["suffixes"])


class Loader:
    """Worker processes, and the batches that they fill. They end with this process, however it ends."""

    def __init__(self, spec: dict[str, Any]) -> None:
        processes = multiprocessing.get_context("spawn")  # so that no worker holds another's pipe open
        height, width = spec["image_size"]
        self._shape = (-1, spec["batch_size"], 3, height, width)
        num_slots = spec["num_processes"] * BATCHES_A_WORKER
        self._memory = processes.RawArray("f", num_slots * spec["batch_size"] * 3 * height * width)
        self._workers = []
        for number in range(spec["num_processes"]):
            ours, theirs = processes.Pipe()
            worker = processes.Process(target=work, args=(number, spec, self._shape, self._memory, theirs), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(ours)
            for slot in range(BATCHES_A_WORKER):
                ours.send(number * BATCHES_A_WORKER + slot)
        self._in_use: tuple[Any, int] | None = None

    def next(self) -> np.ndarray:
        """The first batch that is ready, [B, 3, height, width]; the one before it may be written to from now on."""
        if self._in_use is not None:
            worker, slot = self._in_use
            worker.send(slot)
        worker = connection.wait(self._workers)[0]
        slot = worker.recv()
        self._in_use = worker, slot
        return np.frombuffer(self._memory, np.float32).reshape(self._shape)[slot]


def work(number: int, spec: dict[str, Any], shape: tuple[int, ...], memory: Any, pipe: Any) -> None:
    """A worker: fills the slots that it is told to, until the other end of the pipe is closed."""
    batches = np.frombuffer(memory, np.float32).reshape(shape)  # [slots, B, 3, height, width]
    rng = np.random.default_rng([spec["seed"], number])
    paths = find_images(spec)
    while True:
        try:
            slot = pipe.recv()
        except EOFError:
            return
        for out, image in zip(batches[slot], rng.integers(len(paths), size=len(batches[slot])), strict=True):
            load(paths[image], spec, rng, out)
        pipe.send(slot)


def main() -> None:
    loader = Loader(json.loads(sys.argv[1]))

    def batch() -> int:
        return len(loader.next())

    for _ in range(8):
        batch()
    serve(batch, version=PIL.__version__)


if __name__ == "__main__":
    main()
