"""scikit-learn's handwritten digits as JPEG files in ImageNet's layout: real data without a download.

    ROOT/train/CLASS/digit_0042.jpeg    1,442 images, numbered by their index in `load_digits`
    ROOT/val/CLASS/digit_0047.jpeg      355 images
    ROOT/class_names.txt                one line per class, `FOLDER NAME`; sorted folders are in label order
    ROOT/source.json                    what the dataset was made from, and how

The source is `sklearn.datasets.load_digits`: the test part of UCI's "Optical Recognition of Handwritten Digits"
(https://archive.ics.uci.edu/dataset/80), 1,797 grey images of 8x8 pixels with values from 0 to 16. Each is enlarged, so
that training decodes, crops and resizes real files; they have no more detail than 8x8 pixels.

The split is ours, and fixed: every fifth image of each digit, in the source's order, is for validation. It doesn't test
unseen writers: 13 people wrote UCI's part, the source doesn't say who wrote what, and neighbours in its order may be by
the same person. Expect the same writers in both splits, and an accuracy that says nothing about other people's digits.
"""

import errno
import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vit_static.common.errors import os_reason
from vit_static.common.io import remove_new_folders, write_errors
from vit_static.common.text import json_text
from vit_static.data.manifest import CLASS_NAMES_FILE, SOURCE_FILE, read_manifest

# labels: {folder: name}, folders in label order
CLASS_NAMES = {
    "digit": {
        "0": "zero", "1": "one", "2": "two", "3": "three", "4": "four",
        "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
    },
    "parity": {"even": "even", "odd": "odd"},
}  # fmt: skip

NUM_TRAIN, NUM_VAL = 1442, 355
VAL_EVERY = 5
MIN_SIZE = 64
SOURCE_MAX = 16  # the source's values are 0 to 16
JPEG_QUALITY = 95
_TEMPORARY_PREFIX = ".digits-"


@dataclass(frozen=True)
class DigitsSummary:
    """A complete dataset on disk. With `already_existed`, nothing was written."""

    root: Path
    num_train: int
    num_val: int
    num_classes: int
    already_existed: bool

    def describe(self) -> str:
        """Return the numbers of images and classes."""
        return (
            f"{self.num_train + self.num_val} images ({self.num_train} train, {self.num_val} val, {self.num_classes} "
            "classes)"
        )


def make_digits(
    root: Path, labels: str = "digit", size: int = 80, remedy: str = "give another folder as --out"
) -> DigitsSummary:
    """Write the dataset to `root`, completely or not at all, unless the same complete dataset is there already.

    `labels`: `digit` (ten classes) or `parity` (two); an image is in the same split for both. `size`: pixels per side.
    `remedy`: what messages tell the user to do if `root` can't be used. Raise ValueError for a wrong argument, without
    scikit-learn, or if `root` contains anything else, which is never overwritten.
    """
    if labels not in CLASS_NAMES:
        raise ValueError(f"labels {labels!r}: must be one of {', '.join(CLASS_NAMES)}")
    if size < MIN_SIZE:
        raise ValueError(f"--size {size}: must be at least {MIN_SIZE} pixels per side")
    target = root.resolve()  # a folder can't be renamed onto a symbolic link
    existing = DigitsSummary(root, NUM_TRAIN, NUM_VAL, len(CLASS_NAMES[labels]), already_existed=True)
    # In this order: another process may finish the dataset between the two checks.
    if target.exists() and not is_empty_folder(target):
        if is_complete(target, labels, size):
            return existing
        raise wrong_folder_error(root, labels, size, remedy)

    files = encode_set(*load_source(), labels, size)
    with (
        remove_new_folders(target),
        write_errors(root, sum(map(len, files.values())), target.parent / _TEMPORARY_PREFIX),
        temporary_folder_beside(target, root, remedy) as temporary,
    ):
        # One level down, because only its owner can read the temporary folder itself.
        folder = Path(temporary) / "set"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        assert is_complete(folder, labels, size), "scikit-learn's digits are not the 1,797 expected images"
        try:
            folder.rename(target)  # replaces nothing but an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process has filled the folder in the meantime; this is fine if it made the same dataset.
            if not is_complete(target, labels, size):
                raise wrong_folder_error(root, labels, size, remedy) from error
            return existing
    return replace(existing, already_existed=False)


def load_source() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return grey images of 0 to 255 and their digits, in the source's order. Raise ValueError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; run './run.sh setup' or 'pip install scikit-learn'") from error
    source = load_digits()
    images = np.rint(source.images * (255 / SOURCE_MAX)).astype(np.uint8)  # [1797, 8, 8]
    return images, source.target.astype(np.int64)


def validation_mask(digits: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return True for the images of the validation split: every fifth of each digit, in the given order."""
    mask = np.zeros(len(digits), dtype=np.bool_)
    for digit in range(10):
        mask[np.flatnonzero(digits == digit)[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return mask


def encode_set(images: NDArray[np.uint8], digits: NDArray[np.int64], labels: str, size: int) -> dict[str, bytes]:
    """Return the contents of the dataset's files by their names."""
    files = {}
    in_val = validation_mask(digits)
    for index, (image, digit) in enumerate(zip(images, digits, strict=True)):
        class_folder = str(digit) if labels == "digit" else ("odd" if digit % 2 else "even")
        enlarged = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        encoded = io.BytesIO()
        enlarged.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
        split = "val" if in_val[index] else "train"
        files[f"{split}/{class_folder}/digit_{index:04d}.jpeg"] = encoded.getvalue()
    files[CLASS_NAMES_FILE] = class_names_text(labels).encode()
    files[SOURCE_FILE] = json_text(manifest(labels, size), indent=1).encode() + b"\n"
    return files


def class_names_text(labels: str) -> str:
    return "".join(f"{folder} {name}\n" for folder, name in CLASS_NAMES[labels].items())


def manifest(labels: str, size: int) -> dict[str, str | int]:
    """Return the content of source.json. It has everything that distinguishes one dataset of this tool from another."""
    return {
        "source": "sklearn.datasets.load_digits",
        "labels": labels,
        "size": size,
        "num_train": NUM_TRAIN,
        "num_val": NUM_VAL,
        "split": f"of each digit, every {VAL_EVERY}th image in the source's order is validation",
        "encoding": f"bicubic, RGB, JPEG quality {JPEG_QUALITY}",
    }


def is_complete(folder: Path, labels: str, size: int) -> bool:
    """Return whether the folder is the complete dataset, by its manifest, its class names and its number of files."""
    names_path = folder / CLASS_NAMES_FILE
    return (
        read_manifest(folder / SOURCE_FILE) == manifest(labels, size)
        and names_path.is_file()
        and names_path.read_bytes() == class_names_text(labels).encode()
        and len(list(folder.glob("train/*/*.jpeg"))) == NUM_TRAIN
        and len(list(folder.glob("val/*/*.jpeg"))) == NUM_VAL
    )


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def wrong_folder_error(root: Path, labels: str, size: int, remedy: str) -> ValueError:
    return ValueError(
        f"{root} exists and is not the complete dataset of --labels {labels} --size {size}; {remedy}, or move this one "
        "away"
    )


def temporary_folder_beside(target: Path, root: Path, remedy: str) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder on the file system of `target`, which is removed when its `with` block ends."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=target.parent)
    except OSError as error:  # the exit code depends on the errno, so it stays the same
        raise OSError(error.errno, f"{root} can't be created ({os_reason(error)}); {remedy}") from error
