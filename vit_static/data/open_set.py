"""Datasets as a config names them: class folders, a list file, or WebDataset shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_formats import describe_left_out, is_image_name, left_out_kind
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.list_file import ImageList, Labels, read_list
from vit_static.data.webdataset import UNFINISHED_FILE, open_shards

CLASS_NAMES_FILE = "class_names.txt"
CHECK_FILE = "data_check.json"  # written into ROOT by `./run.sh data check ROOT`


def split_path(data: DataConfig, split: str) -> Path:
    """Return the folder or list file of a split, `train` or `val`."""
    return Path(data.root) / {"train": data.train, "val": data.val}[split]


def open_set(data: DataConfig, split: str, num_classes: int) -> ImageDataset:
    """Open a split, `train` or `val`: a folder of class folders, a list file, or a folder of WebDataset shards.

    Class folders are labelled in sorted order. Raise DataError, with the remedy, if something is missing or empty, if
    train and val have different classes, if there aren't `num_classes` of them, or if an image has several labels
    without `data.multi_label`.
    """
    path = split_path(data, split)
    images = _open(path, data, split, num_classes)
    if data.on_bad_image == "skip":
        images = images.exclude(_bad_images(data))
        if not len(images):
            report = Path(data.root) / CHECK_FILE
            raise DataError(f"{path}: {report} lists all of its images as bad; repair them or set another data.root")
    return images


def _open(path: Path, data: DataConfig, split: str, num_classes: int) -> ImageDataset:
    root = Path(data.root)
    if path.is_file():
        image_list = read_list(path)
        _check_labels(image_list.labels, path, data, num_classes)
        return FileDataset(root, image_list, _names_by_label(root, num_classes))
    if has_shards(path):
        return open_shards(path, root, _names_by_label(root, num_classes), data.multi_label)
    return _open_folders(path, data, split, num_classes)


def has_shards(path: Path) -> bool:
    """Return whether a folder has shards, or will have them when `data shards` has finished."""
    return path.is_dir() and (any(path.glob("*.tar")) or (path / UNFINISHED_FILE).exists())


def _open_folders(path: Path, data: DataConfig, split: str, num_classes: int) -> FileDataset:
    root = Path(data.root)
    folders = class_folders(path)
    if len(folders) != num_classes:
        raise DataError(
            f"{path}: has {len(folders)} class folders, but model.num_classes is {num_classes}; "
            f"set model.num_classes={len(folders)} or another data.root"
        )
    train_path = split_path(data, "train")
    if split != "train" and train_path.is_dir() and not has_shards(train_path):
        differing = sorted({folder.name for folder in class_folders(train_path)} ^ {folder.name for folder in folders})
        if differing:
            raise DataError(
                f"{root}: train and {split} must have the same class folders, but differ in {differing[0]!r}; add the "
                "folder that is missing, or remove the other"
            )
    image_list, counts, left_out = list_folders(folders, root)
    if not counts.all():
        empty = folders[int(np.argmin(counts))]
        contents = describe_left_out(list_folders([empty], root)[2])
        raise DataError(
            f"{empty}: this class folder has no image{contents and f' (only {contents})'}; add images, or remove it "
            "from every split"
        )
    names = dict(_class_names(root))
    return FileDataset(root, image_list, [names.get(folder.name, folder.name) for folder in folders], left_out)


def list_folders(folders: list[Path], root: Path) -> tuple[ImageList, np.ndarray, Counter[str]]:
    """List the images of class folders, sorted by folder and name.

    Also return the number of images per folder, and the counts of what is left out by `image_formats.left_out_kind`.
    The label is the position of the folder in `folders`.
    """
    paths: list[bytes] = []
    left_out: Counter[str] = Counter()
    counts = np.zeros(len(folders), np.int64)
    for label, folder in enumerate(folders):
        relative_folder = os.fsencode(os.path.relpath(folder, root))
        names = sorted(_images_in(folder, left_out))
        paths += [relative_folder + b"/" + name for name in names]
        counts[label] = len(names)
    lengths = np.fromiter(map(len, paths), np.int64, len(paths))
    stops = np.cumsum(lengths)
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    return ImageList(np.frombuffer(b"".join(paths), np.uint8), stops - lengths, stops, Labels(labels)), counts, left_out


def _images_in(folder: Path, left_out: Counter[str]) -> Iterator[bytes]:
    """Yield the names of a folder's images, and count everything else."""
    with os.scandir(os.fsencode(folder)) as entries:  # unlike Path, it tells files from folders without a system call
        for entry in entries:
            if is_image_name(entry.name) and not entry.name.startswith(b".") and _is_file(entry):
                yield entry.name
            else:
                left_out[left_out_kind(entry.name, _is_folder(entry))] += 1


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a symbolic link to itself
        return False


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def class_folders(folder: Path) -> list[Path]:
    """Return the class folders in a folder, in label order. Raise DataError if there are none."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder or list; set data.root, data.train and data.val to a folder of class folders, "
            "a list file, or a folder of shards ('./run.sh data digits' makes a small dataset; the README explains "
            "the layout of ImageNet)"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{folder}: has neither class folders nor shards; put images in {folder}/CLASS/")
    return folders


def count_classes(data: DataConfig, split: str) -> int:
    """Return the number of class folders, or the highest label of a list plus 1."""
    path = split_path(data, split)
    return 1 + int(read_list(path).labels.values.max()) if path.is_file() else len(class_folders(path))


def _check_labels(labels: Labels, path: Path, data: DataConfig, num_classes: int) -> None:
    if labels.offsets is not None and not data.multi_label:
        index = int(np.argmax(np.diff(labels.offsets) > 1))
        raise DataError(
            f"{path}: image {index + 1} has several labels; set data.multi_label=true (and loss.name=sigmoid)"
        )
    max_label = int(labels.values.max())
    if max_label >= num_classes:
        raise DataError(
            f"{path}: has a label {max_label}, but model.num_classes is {num_classes} and labels begin at 0; "
            f"set model.num_classes={max_label + 1} or another list"
        )


def _class_names(root: Path) -> list[tuple[str, str]]:
    """Return folder and name of each class from class_names.txt, in label order; empty if there is no such file.

    A line has the folder, a space and the name.
    """
    path = root / CLASS_NAMES_FILE
    if not path.is_file():
        return []
    lines = [line.split(maxsplit=1) for line in read_class_names(path)]
    return [(line[0], line[1].strip()) for line in lines if len(line) == 2]


def read_class_names(path: Path) -> list[str]:
    """Return the lines of a class_names.txt. Raise DataError if it isn't text."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: is not UTF-8 text; write it again, with one line per class: its folder and its name"
        ) from None


def _names_by_label(root: Path, num_classes: int) -> list[str]:
    """Return the class names of a dataset without class folders: those of class_names.txt if their number is right."""
    names = [name for _, name in _class_names(root)]
    return names if len(names) == num_classes else [str(label) for label in range(num_classes)]


def check_command(data: DataConfig) -> str:
    """Return the command that reads all images of a dataset."""
    options = [f" --{split} {name}" for split, name in (("train", data.train), ("val", data.val)) if name != split]
    return f"./run.sh data check {data.root}{''.join(options)}"


def _bad_images(data: DataConfig) -> list[str]:
    path = Path(data.root) / CHECK_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        names = [problem["path"] for problem in report["problems"] if problem["stops_training"]]
        for name in names:
            os.fsencode(name)
        return names
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}), but data.on_bad_image=skip leaves out the images that it "
            f"lists; create it with '{check_command(data)}'"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: is not a report of 'data check'; create it with '{check_command(data)}'") from None
