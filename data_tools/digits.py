"""scikit-learn's handwritten digits as JPEG files in ImageNet's layout: real data without a download.

    ROOT/train/CLASS/digit_0042.jpeg    1,442 images; the number is the image's index in `load_digits`
    ROOT/val/CLASS/digit_0047.jpeg        355 images
    ROOT/class_names.txt                a line a class, `FOLDER NAME`; sorted folders are in label order
    ROOT/source.json                    what the set was made from and how

The source is `sklearn.datasets.load_digits`: the test part of UCI's "Optical Recognition of Handwritten
Digits" (https://archive.ics.uci.edu/dataset/80), 1,797 grey images of 8x8 pixels with values 0 to 16. Each is
scaled up, so that training decodes, crops and resizes real files; they hold no more detail than 8x8 pixels.

The split is ours and fixed: of each digit, every fifth image in the source's order is validation. It is no
test of unseen writers: UCI took this part from 13 people, the source doesn't say who wrote what, and
neighbours in its order may well be of one hand. Expect the same writers on both sides, and an accuracy that
says nothing of a stranger's digits.
"""

import errno
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.arguments import ToolParser
from vit_static.common.io import write_json

# labels: {folder: name}, folders in label order
CLASS_NAMES = {
    "digit": {
        "0": "zero", "1": "one", "2": "two", "3": "three", "4": "four",
        "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
    },
    "parity": {"even": "even", "odd": "odd"},
}  # fmt: skip
DEFAULT_ROOTS = {"digit": Path("data/digits"), "parity": Path("data/digits_parity")}

NUM_TRAIN, NUM_VAL = 1442, 355
VAL_EVERY = 5
MIN_SIZE = 64
SOURCE_MAX = 16  # the source's values are 0 to 16
JPEG_QUALITY = 95


@dataclass(frozen=True)
class DigitsSummary:
    """A complete set on disk. `was_there`: it stood there before, and nothing was written."""

    root: Path
    num_train: int
    num_val: int
    num_classes: int
    was_there: bool


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises ValueError for a wrong argument."""
    parser = ToolParser(prog="vit_static data digits", description="Handwritten digits as JPEG files.")
    parser.add_argument("--labels", choices=list(CLASS_NAMES), default="digit",
                        help="ten digits, or the two classes even and odd (default: digit)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="default: data/digits, or data/digits_parity for --labels parity")  # fmt: skip
    parser.add_argument("--size", type=int, default=80, help=f"pixels a side, from {MIN_SIZE} up (default: 80)")
    arguments = parser.parse_args(argv)

    made = make_digits(arguments.out or DEFAULT_ROOTS[arguments.labels], arguments.labels, arguments.size)
    print(
        f"digits: {made.num_train + made.num_val} images of {arguments.size}x{arguments.size} pixels "
        f"({made.num_train} train, {made.num_val} val, {made.num_classes} classes) "
        f"{'are already' if made.was_there else 'written'} in {made.root}"
    )
    return 0


def make_digits(root: Path, labels: str = "digit", size: int = 80) -> DigitsSummary:
    """Writes the set to `root`, complete or not at all, or leaves the same complete set that is there alone.

    `labels`: `digit` (ten classes) or `parity` (two); an image is on the same side of the split for both.
    `size`: pixels a side. Raises ValueError for a wrong argument, where scikit-learn is missing, and where
    `root` holds anything else: it is never overwritten.
    """
    if labels not in CLASS_NAMES:
        raise ValueError(f"labels {labels!r} is none of {', '.join(CLASS_NAMES)}")
    if size < MIN_SIZE:
        raise ValueError(f"--size {size} is too small: at least {MIN_SIZE} pixels a side")
    target = root.resolve()  # through a symbolic link, which a folder can't be renamed onto
    num_classes = len(CLASS_NAMES[labels])
    there = DigitsSummary(root, NUM_TRAIN, NUM_VAL, num_classes, was_there=True)
    # In this order: another process may finish the set between the two questions.
    if target.exists() and not is_empty_folder(target):
        if is_complete(target, labels, size):
            return there
        raise foreign_folder(root, labels, size)

    images, digits = load_source()
    with beside(target, root) as scratch:
        # One level down, because the scratch folder itself is made for its owner's eyes only.
        built = Path(scratch) / "set"
        write_set(built, images, digits, labels, size)
        try:
            built.rename(target)  # takes the place of nothing or of an empty folder, of nothing else
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Somebody else filled the folder meanwhile: fine where it was this same program.
            if not is_complete(target, labels, size):
                raise foreign_folder(root, labels, size) from error
            return there
    return replace(there, was_there=False)


def load_source() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey images of 0 to 255 and their digits, in the source's order. ValueError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: ./run.sh setup, or pip install scikit-learn") from error
    source = load_digits()
    images = np.rint(source.images * (255 / SOURCE_MAX)).astype(np.uint8)  # [1797, 8, 8]
    return images, source.target.astype(np.int64)


def validation_mask(digits: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True where an image is validation: of each digit every fifth, in the order given."""
    mask = np.zeros(len(digits), dtype=np.bool_)
    for digit in range(10):
        mask[np.flatnonzero(digits == digit)[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return mask


def write_set(folder: Path, images: NDArray[np.uint8], digits: NDArray[np.int64], labels: str, size: int) -> None:
    """Writes a whole set into the new folder `folder`."""
    for split in ("train", "val"):
        for class_folder in CLASS_NAMES[labels]:
            (folder / split / class_folder).mkdir(parents=True)
    in_val = validation_mask(digits)
    for index, (image, digit) in enumerate(zip(images, digits, strict=True)):
        class_folder = str(digit) if labels == "digit" else ("odd" if digit % 2 else "even")
        path = folder / ("val" if in_val[index] else "train") / class_folder / f"digit_{index:04d}.jpeg"
        enlarged = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        # By way of memory: Pillow, writing to a file itself, takes a full disk's short write for a whole one.
        encoded = io.BytesIO()
        enlarged.convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
        path.write_bytes(encoded.getvalue())
    (folder / "class_names.txt").write_text(class_names_text(labels), encoding="utf-8")
    write_json(manifest(labels, size), folder / "source.json")
    assert is_complete(folder, labels, size), "scikit-learn's digits are not the 1,797 that we know"


def class_names_text(labels: str) -> str:
    return "".join(f"{folder} {name}\n" for folder, name in CLASS_NAMES[labels].items())


def manifest(labels: str, size: int) -> dict[str, str | int]:
    """What `source.json` says. A set of another recipe says something else, and is not taken for this one."""
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
    """Whether `folder` holds the whole set of these labels and size, by its manifest and number of files."""
    try:
        found = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        names = (folder / "class_names.txt").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: neither JSON nor UTF-8
        return False
    return (
        found == manifest(labels, size)
        and names == class_names_text(labels)
        and len(list(folder.glob("train/*/*.jpeg"))) == NUM_TRAIN
        and len(list(folder.glob("val/*/*.jpeg"))) == NUM_VAL
    )


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def foreign_folder(root: Path, labels: str, size: int) -> ValueError:
    return ValueError(
        f"{root} exists and is not the complete set of --labels {labels} --size {size}: "
        "name another folder with --out, or move this one away"
    )


def beside(target: Path, root: Path) -> tempfile.TemporaryDirectory[str]:
    """A scratch folder on the file system of `target`; it goes away however its `with` ends."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".digits-", dir=target.parent)
    except OSError as error:  # the errno stays, and with it the kind of error
        message = f"{root} can't be made ({error.strerror}): name another folder with --out"
        raise OSError(error.errno, message) from error
