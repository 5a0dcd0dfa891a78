"""Training images with PIL, the way torchvision's transforms and PyTorch's DataLoader produce them.

Each image is decoded completely, randomly cropped, resized, flipped and normalised. Worker processes fill batches in
shared memory.

`python pil_data.py SPEC` with the SPEC of bench/data.py, in the environment of .requirements/bench.txt.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from protocol import serve

NUM_CROP_ATTEMPTS = 10
BATCHES_PER_WORKER = 2  # prefetched: DataLoader's prefetch_factor
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

LoadImage = Callable[[str, dict[str, Any], np.random.Generator, np.ndarray], None]
Box = tuple[int, int, int, int]  # left, upper, right, lower


def random_crop(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw the box of torchvision's RandomResizedCrop.

    The share of the area is uniform in `area`, the logarithm of the aspect ratio (width / height) in the range of
    `aspect`, the position among those that fit. If none of ten draws fits, the box is the largest centred one within
    the range of aspect ratios.
    """
    for _ in range(NUM_CROP_ATTEMPTS):
        crop_area = width * height * rng.uniform(*area)
        crop_aspect = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        crop_width = round(math.sqrt(crop_area * crop_aspect))
        crop_height = round(math.sqrt(crop_area / crop_aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            upper = int(rng.integers(height - crop_height + 1))
            return left, upper, left + crop_width, upper + crop_height
    crop_width = min(width, round(height * aspect[1]))
    crop_height = min(height, round(width / aspect[0]))
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def load(path: str, spec: dict[str, Any], rng: np.random.Generator, out: np.ndarray) -> None:
    """Load a training image into `out`, [3, height, width] float32."""
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
    """Return the image files of all class folders, sorted."""
    return sorted(str(path) for path in Path(spec["folder"]).glob("*/*") if path.suffix.lower() in spec["suffixes"])


class Loader:
    """Worker processes and the batches they fill. The workers end with this process, even if it is killed."""

    def __init__(self, spec: dict[str, Any], load_image: LoadImage) -> None:
        context = multiprocessing.get_context("spawn")  # a forked worker would hold the pipes of the others open
        height, width = spec["image_size"]
        self._shape = (-1, spec["batch_size"], 3, height, width)
        num_slots = spec["num_processes"] * BATCHES_PER_WORKER
        self._memory = context.RawArray("f", num_slots * spec["batch_size"] * 3 * height * width)
        self._pipes = []
        for number in range(spec["num_processes"]):
            our_end, worker_end = context.Pipe()
            arguments = number, spec, load_image, self._shape, self._memory, worker_end
            worker = context.Process(target=fill_batches, args=arguments, daemon=True)
            worker.start()
            worker_end.close()
            self._pipes.append(our_end)
            for slot in range(BATCHES_PER_WORKER):
                our_end.send(number * BATCHES_PER_WORKER + slot)
        self._in_use: tuple[Any, int] | None = None

    def next(self) -> np.ndarray:
        """Return the first batch that is ready, [B, 3, height, width]; the previous one may be overwritten now."""
        if self._in_use is not None:
            pipe, slot = self._in_use
            pipe.send(slot)
        pipe = connection.wait(self._pipes)[0]
        slot = pipe.recv()
        self._in_use = pipe, slot
        return np.frombuffer(self._memory, np.float32).reshape(self._shape)[slot]


def fill_batches(
    number: int, spec: dict[str, Any], load_image: LoadImage, shape: tuple[int, ...], memory: Any, pipe: Any
) -> None:
    """Fill the slots whose numbers arrive in the pipe, until its other end is closed: the work of one process."""
    batches = np.frombuffer(memory, np.float32).reshape(shape)  # [slots, B, 3, height, width]
    rng = np.random.default_rng([spec["seed"], number])
    paths = find_images(spec)
    while True:
        try:
            slot = pipe.recv()
        except EOFError:
            return
        for out, image in zip(batches[slot], rng.integers(len(paths), size=len(batches[slot])), strict=True):
            load_image(paths[image], spec, rng, out)
        pipe.send(slot)


def main(load_image: LoadImage, version: str) -> None:
    """Load batches with a function that loads an image, as a candidate of `bench data`."""
    loader = Loader(json.loads(sys.argv[1]), load_image)

    def batch() -> int:
        return len(loader.next())

    for _ in range(8):
        batch()
    serve(batch, version=version)


if __name__ == "__main__":
    main(load, PIL.__version__)
