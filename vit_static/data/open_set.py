"""The set that a config names: class folders, a list file, or shards, whichever `data.train` and `data.val` are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError
from vit_static.config.schema import DataConfig
from vit_static.data.image_set import IMAGE_SUFFIXES, FileDataset, ImageDataset
from vit_static.data.list_file import ImageList, Labels, read_list
from vit_static.data.webdataset import UNFINISHED_FILE, open_shards

CLASS_NAMES_FILE = "class_names.txt"
CHECK_FILE = "data_check.json"  # what `./run.sh data check ROOT` writes into ROOT


def open_set(data: DataConfig, split: str, num_classes: int) -> ImageDataset:
    """The images of `train` or `val`: what `data.train` or `data.val` names below `data.root`.

    A folder with class folders (in sorted order they are the labels), a list file, or a folder of WebDataset shards.
    Raises DataError, with the remedy, where something is missing or empty, where train and val have different classes,
    where there are not `num_classes` of them, and where an image has several labels without `data.multi_label`.
    """
    root = Path(data.root)
    place = root / {"train": data.train, "val": data.val}[split]
    images = _open(place, root, data, split, num_classes)
    if data.on_bad_image == "skip":
        images = images.exclude(_bad_images(data))
        if not len(images):
            raise DataError(f"{place}: all of its images are bad ones by {root / CHECK_FILE}")
    return images


def _open(place: Path, root: Path, data: DataConfig, split: str, num_classes: int) -> ImageDataset:
    if place.is_file():
        lines = read_list(place)
        _check_labels(lines.labels, place, data, num_classes)
        return FileDataset(root, lines, _names_by_label(root, num_classes))
    if is_of_shards(place):
        return open_shards(place, root, _names_by_label(root, num_classes), data.multi_label)
    return _open_folders(place, root, data, split, num_classes)


def is_of_shards(place: Path) -> bool:
    """Whether a folder holds shards, or will when `data shards` has finished."""
    return place.is_dir() and (any(place.glob("*.tar")) or (place / UNFINISHED_FILE).exists())


def _open_folders(place: Path, root: Path, data: DataConfig, split: str, num_classes: int) -> FileDataset:
    folders = class_folders(place)
    if len(folders) != num_classes:
        raise DataError(
            f"{place}: has {len(folders)} class folders where model.num_classes is {num_classes}; "
            f"set model.num_classes={len(folders)} or another data.root"
        )
    train = root / data.train
    if split != "train" and train.is_dir() and not is_of_shards(train):
        odd = sorted(set(map(os.path.basename, class_folders(train))) ^ set(map(os.path.basename, folders)))
        if odd:
            raise DataError(f"{root}: train and {split} must have the same class folders, but differ in {odd[0]!r}")
    lines, counts = list_folders(folders, root)
    if not counts.all():
        empty = folders[int(np.argmin(counts))]
        raise DataError(f"{empty}: this class folder has no image; put images in, or remove it from every split")
    names = dict(_class_names(root))
    return FileDataset(root, lines, [names.get(folder.name, folder.name) for folder in folders])


def list_folders(folders: list[Path], root: Path) -> tuple[ImageList, np.ndarray]:
    """The images of class folders by folder and name, the folders' numbers as labels; how many are in each folder."""
    paths: list[bytes] = []
    counts = np.zeros(len(folders), np.int64)
    for label, folder in enumerate(folders):
        below = os.fsencode(os.path.relpath(folder, root))
        images = sorted(_images_in(folder))
        paths += [below + b"/" + name for name in images]
        counts[label] = len(images)
    lengths = np.fromiter(map(len, paths), np.int64, len(paths))
    stops = np.cumsum(lengths)
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return ImageList(np.frombuffer(b"".join(paths), np.uint8), stops - lengths, stops, Labels(labels)), counts


def _images_in(folder: Path) -> Iterator[bytes]:
    with os.scandir(os.fsencode(folder)) as entries:  # which, unlike a Path, knows a file without asking the disk
        for entry in entries:
            is_hidden = entry.name.startswith(b".")
            suffix = os.path.splitext(entry.name)[1].decode("ascii", "replace").lower()  # noqa: PTH122 - bytes
            if not is_hidden and suffix in IMAGE_SUFFIXES and _is_file(entry):
                yield entry.name


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder or list; data.root must hold what data.train and data.val name: class folders "
            "in a folder, a list file, or a folder of shards ('./run.sh data digits' makes a small set, the README "
            "says how to lay out ImageNet)"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{folder}: has neither class folders nor shards; images belong in {folder}/CLASS/")
    return folders


def count_classes(data: DataConfig, split: str) -> int:
    """How many classes a set of class folders has, or a list by its highest label."""
    place = Path(data.root) / {"train": data.train, "val": data.val}[split]
    return 1 + int(read_list(place).labels.values.max()) if place.is_file() else len(class_folders(place))


def _check_labels(labels: Labels, place: Path, data: DataConfig, num_classes: int) -> None:
    if labels.offsets is not None and not data.multi_label:
        image = int(np.argmax(np.diff(labels.offsets) > 1))
        raise DataError(
            f"{place}: image {image + 1} has several labels; set data.multi_label=true (and loss.name=sigmoid)"
        )
    highest = int(labels.values.max())
    if highest >= num_classes:
        raise DataError(
            f"{place}: has a label {highest}, where model.num_classes is {num_classes} and labels begin at 0; "
            f"set model.num_classes={highest + 1} or another list"
        )


def _class_names(root: Path) -> list[tuple[str, str]]:
    """The set's class_names.txt (a line a class, in label order: its folder, a blank, its name), if there is one."""
    path = root / CLASS_NAMES_FILE
    if not path.is_file():
        return []
    lines = [line.split(maxsplit=1) for line in read_class_names(path)]
    return [(line[0], line[1].strip()) for line in lines if len(line) == 2]


def read_class_names(path: Path) -> list[str]:
    """The lines of a class_names.txt. Raises DataError where they are no text."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; write it anew: a line a class, its folder and its name") from None


def _names_by_label(root: Path, num_classes: int) -> list[str]:
    """The names of a set that has labels in place of folders: those of class_names.txt if it has one a class."""
    names = [name for _, name in _class_names(root)]
    return names if len(names) == num_classes else [str(label) for label in range(num_classes)]


def check_command(data: DataConfig) -> str:
    """What reads all of a set's images."""
    options = [f" --{split} {place}" for split, place in (("train", data.train), ("val", data.val)) if place != split]
    return f"./run.sh data check {data.root}{''.join(options)}"


def _bad_images(data: DataConfig) -> list[str]:
    path = Path(data.root) / CHECK_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        bad = [problem["path"] for problem in report["problems"] if problem["stops_training"]]
        for name in bad:
            os.fsencode(name)
        return bad
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}), and data.on_bad_image=skip leaves out what it lists; "
            f"make it with '{check_command(data)}'"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: is no report of 'data check'; make it anew with '{check_command(data)}'") from None
