"""Small datasets of generated images for tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_static.config.data_schema import DataConfig
from vit_static.data.digits import make_digits
from vit_static.data.image_pixels import DecodeOptions

UPRIGHT_ON_WHITE = DecodeOptions("apply", (255, 255, 255))  # the config's defaults


def copy_part(source: Path, target: Path, num_train: int, num_val: int) -> None:
    """Copy the first images of each class of a dataset."""
    for split, count in (("train", num_train), ("val", num_val)):
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, target / split / folder.name)
    shutil.copy(source / "class_names.txt", target)


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset with 12 training and 3 validation images of each of the ten digits."""
    base = tmp_path_factory.mktemp("digits")
    make_digits(base / "all", "digit", 80)
    copy_part(base / "all", base / "small", 12, 3)
    return base / "small"


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an image with smooth colours, an edge, and noise like a camera's."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(7 * x / width + c) + np.cos(5 * y / height + 2 * c) + np.sin((x + y) / 23 + c) for c in range(3)]
    pixels = 128 + 35 * np.stack(waves, axis=-1)
    pixels[height // 3 :, : width // 4] *= 0.5
    pixels += np.random.default_rng(seed).normal(0, 12, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., DataConfig]:
    """make_set({"train/cat/1.jpeg": photo(...)}, {"train/cat/2.jpeg": b"junk"}) writes files and returns a config."""

    def make(*files: dict[str, Image.Image | bytes], **data: Any) -> DataConfig:
        for path, content in {path: content for group in files for path, content in group.items()}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (tmp_path / path).write_bytes(content)
            else:
                content.save(tmp_path / path)
        return DataConfig(**{"root": str(tmp_path), "global_batch_size": 4, "num_threads": 1, **data})

    return make


def thirteen_images(split: str = "train", num_classes: int = 1) -> dict[str, Image.Image | bytes]:
    """Return the files of 13 images with different sizes, distributed over class folders."""
    return {f"{split}/c{n % num_classes}/{n:02d}.jpeg": photo(40 + n, 60 - n, seed=n) for n in range(13)}
