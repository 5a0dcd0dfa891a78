"""A small dataset, packed into WebDataset shards, and its images as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_tools.__main__ import main
from helpers.sets import photo
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import open_set

NUM_IMAGES, NUM_CLASSES = 23, 3


@pytest.fixture(name="source")
def shard_source(tmp_path: Path) -> Path:
    """Class folders of JPEG and PNG files, with one validation image per class."""
    root = tmp_path / "source"
    for number in range(NUM_IMAGES):
        folder = root / "train" / f"c{number % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ("jpeg", "JPG", "png")[number % 3]
        photo(30 + number, 40, seed=number).save(folder / f"image {number}.{suffix}")
    for label in range(NUM_CLASSES):
        (root / "val" / f"c{label}").mkdir(parents=True)
        photo(30, 30, seed=100 + label).save(root / f"val/c{label}/v.jpeg")
    (root / "class_names.txt").write_text("c0 cat\nc1 cow\nc2 dog\n")
    return root


def pack(source: Path, out: Path, *arguments: str) -> Path:
    """Run `data shards` with shards of at most 20 KB; return its folder."""
    assert main(["shards", "--root", str(source), "--out", str(out), "--shard-mb", "0.02", *arguments]) == 0
    return out


def open_split(root: Path, split: str = "train", **data: Any) -> ImageDataset:
    """Open one split of a folder of class folders or of shards."""
    return open_set(DataConfig(root=str(root), **data), split, NUM_CLASSES)


def contents(images: ImageDataset) -> list[tuple[bytes, list[int]]]:
    """Return the file and the labels of each image, in order."""
    return [(encoded.tobytes(), labels.tolist()) for encoded, labels in map(images.read, range(len(images)))]
