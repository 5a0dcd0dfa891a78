"""The list of a set's images: what is in the class folders, with labels and class names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.config import DataConfig, UserError

# What DALI's and Pillow's decoders both read. Other files in a class folder (.DS_Store, notes) are no images.
IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
CLASS_NAMES_FILE = "class_names.txt"


class DataError(UserError):
    """A data set that can't be used as it is."""


@dataclass(frozen=True)
class ImageList:
    """Images in a fixed order (by class folder, then by name) and their labels, 0 to num_classes - 1."""

    paths: list[str]
    labels: np.ndarray  # [num_images], int64
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def list_images(data: DataConfig, split: str, num_classes: int) -> ImageList:
    """The images of ``root/split/CLASS/*``; folders in sorted order are the labels.

    Raises DataError, with the remedy, where a folder is missing or empty, where train and val have different
    classes, or where there are not `num_classes` of them.
    """
    root = Path(data.root)
    folders = _class_folders(root, split)
    if len(folders) != num_classes:
        raise DataError(
            f"{root / split}: has {len(folders)} class folders where model.num_classes is {num_classes}; "
            f"set model.num_classes={len(folders)} or another data.root"
        )
    if split != "train" and (root / "train").is_dir():
        known = [folder.name for folder in _class_folders(root, "train")]
        odd = sorted(set(known) ^ {folder.name for folder in folders})
        if odd:
            raise DataError(f"{root}: train and {split} must have the same class folders, but differ in {odd[0]!r}")
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(_images_in(folder))
        if not images:
            raise DataError(f"{folder}: this class folder has no image; put images in, or remove it from every split")
        paths += images
        labels += [label] * len(images)
    names = _class_names(root)
    return ImageList(paths, np.asarray(labels, np.int64), [names.get(folder.name, folder.name) for folder in folders])


def _images_in(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:  # which, unlike a Path, knows a file without asking the disk
        for entry in entries:
            is_hidden = entry.name.startswith(".")
            if not is_hidden and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
                yield entry.path


def _class_folders(root: Path, split: str) -> list[Path]:
    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; data.root must hold train/CLASS/* and val/CLASS/* "
            "('./run.sh data digits' makes a small set, the README says how to lay out ImageNet)"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{folder}: has no class folders; images belong in {folder}/CLASS/")
    return folders


def _class_names(root: Path) -> dict[str, str]:
    """Folder to name, from the set's class_names.txt (a line each: the folder, a space, the name), if there is one."""
    path = root / CLASS_NAMES_FILE
    if not path.is_file():
        return {}
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}
