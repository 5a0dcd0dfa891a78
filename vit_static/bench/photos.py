"""Photographs for the data benchmarks: JPEG files of ImageNet's usual size, generated for each run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vit_static.common.errors import UserError

NUM_PHOTOS, NUM_PHOTO_CLASSES = 256, 2
PHOTO_SIZE, JPEG_QUALITY = (500, 375), 97  # ImageNet's most common width and height; about 95 kB per file


def write_photos(root: Path, num_photos: int = NUM_PHOTOS) -> str:
    """Write a training set of crops from scikit-learn's two sample photographs, one class each; return a description.

    Raise UserError if scikit-learn isn't installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError(
            "bench: scikit-learn, whose sample photographs are used, isn't installed; install it with "
            f"{sys.executable} -m pip install scikit-learn"
        ) from None
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 wide, 427 high
    width, height = PHOTO_SIZE
    rng = np.random.default_rng(0)
    num_bytes = 0
    for number in range(num_photos):
        label = number % NUM_PHOTO_CLASSES
        photograph = photographs[label]
        crop_height = int(photograph.height * rng.uniform(0.75, 1.0))
        crop_width = crop_height * width // height
        left = int(rng.integers(photograph.width - crop_width + 1))
        upper = int(rng.integers(photograph.height - crop_height + 1))
        image = photograph.crop((left, upper, left + crop_width, upper + crop_height))
        image = image.resize(PHOTO_SIZE, Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = root / "train" / str(label) / f"{number:04d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=JPEG_QUALITY)
        num_bytes += path.stat().st_size
    kilobytes = num_bytes / num_photos / 1e3
    return f"{num_photos} JPEG files of {width}x{height} pixels, {kilobytes:.0f} kB each, generated for this run"
