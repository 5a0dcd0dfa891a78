"""Datasets as a config names them: class folders, a list file, a table, or WebDataset shards."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError, escape, newer_format, os_reason, truncate
from vit_static.common.text import counted, display_name, path_of, read_lines
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_formats import describe_left_out, is_image_name, left_out_kind
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.list_file import ImageList, Labels, read_list
from vit_static.data.manifest import CLASS_NAMES_FILE
from vit_static.data.prepare import prepare_set
from vit_static.data.table import Table, is_table, read_table
from vit_static.data.webdataset import UNFINISHED_FILE, open_shards

_MAX_NAMED_CLASSES = 8
_LINE_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
CHECK_FORMAT = 1  # of that file; a file without a number has it, too
CHECK_FILE = "data_check.json"  # written into ROOT by `./run.sh data check ROOT`


def split_path(data: DataConfig, split: str) -> Path:
    """Return the folder, list file or table of a split, `train` or `val`."""
    return Path(data.root) / {"train": data.train, "val": data.val}[split]


def open_set(data: DataConfig, split: str, num_classes: int) -> ImageDataset:
    """Open a split, `train` or `val`: class folders, a list file, a table, or a folder of WebDataset shards.

    Class folders are labelled in sorted order, and so are a table's names of classes. Raise DataError, with the remedy,
    if something is missing or empty, if train and val have different classes, if there aren't `num_classes` of them, or
    if an image has several labels without `data.multi_label`. A data set that data.prepare names is created first.
    """
    prepare_set(data)
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
        image_list, classes = read_label_file(path, data, split)
        if classes is None:
            _check_labels(image_list.labels, path, data, num_classes)
            return FileDataset(root, image_list, _names_by_label(root, num_classes))
        if len(classes) != num_classes:
            raise DataError(
                f"{path}: its labels are the names of {counted(len(classes), 'class')}, but model.num_classes is "
                f"{num_classes}; set model.num_classes={len(classes)}"
            )
        return FileDataset(root, image_list, _display_names(root, classes))
    if has_shards(path):
        return open_shards(path, root, _names_by_label(root, num_classes), data.multi_label)
    return _open_folders(path, data, split, num_classes)


def read_label_file(path: Path, data: DataConfig, split: str) -> tuple[ImageList, list[str] | None]:
    """Read a list file or a table; also return the classes if labels are their names, None if they are numbers.

    Names of classes become numbers in the order of the training set's classes. Raise DataError, with the row, for an
    image without a label or, unless `data.multi_label`, with several.
    """
    if not is_table(path):
        return read_list(path).with_first_label(data.first_label), None
    table = read_table(path, data)
    classes, source = _table_classes(table, data, split)
    if classes is None:
        return table.with_numbers(data.first_label), None
    if data.first_label:
        raise DataError(f"{path}: its labels are names, which have no first number; leave out data.first_label")
    return table.with_classes(classes, source), classes


def _table_classes(table: Table, data: DataConfig, split: str) -> tuple[list[str] | None, Path]:
    """Return the names of the classes that a table's labels refer to (None: numbers), and what defines them."""
    train_path = split_path(data, "train")
    classes = table.class_names(data.label_type)
    if split == "train":
        return classes, table.path
    train_classes = _training_classes(data)
    if train_classes is not None or classes is None:
        return train_classes, train_path
    names_path = Path(data.root) / CLASS_NAMES_FILE
    for names in zip(*_class_names(Path(data.root)), strict=True):  # the folders, the names
        if set(names) >= set(table.texts):
            return list(names), names_path
    raise DataError(
        f"{table.path}: its labels are names, but {train_path} doesn't name the classes, nor does {names_path}; write "
        "that file, or use numbers"
    )


def _training_classes(data: DataConfig) -> list[str] | None:
    """Return the names of classes by which the training set is labelled; None if they are numbers."""
    train_path = split_path(data, "train")
    if is_table(train_path) and train_path.is_file():
        return read_table(train_path, data).class_names(data.label_type)
    if train_path.is_dir() and not has_shards(train_path):
        return [folder.name for folder in class_folders(train_path)]
    return None


def has_shards(path: Path) -> bool:
    """Return whether a folder has shards, or will have them when `data shards` has finished."""
    return path.is_dir() and (any(path.glob("*.tar")) or (path / UNFINISHED_FILE).exists())


def _open_folders(path: Path, data: DataConfig, split: str, num_classes: int) -> FileDataset:
    root = Path(data.root)
    folders = class_folders(path)
    if len(folders) != num_classes:
        raise DataError(
            f"{path}: has {counted(len(folders), 'class folder')}, but model.num_classes is {num_classes}; "
            f"set model.num_classes={len(folders)} or another data.root"
        )
    classes = None if split == "train" else _training_classes(data)
    if classes is not None:
        differing = sorted({*classes} ^ {folder.name for folder in folders})
        if differing:
            raise DataError(
                f"{root}: train and {split} must have the same classes, but differ in {differing[0]!r}; add the folder "
                "that is missing, or remove the other"
            )
        positions = {name: position for position, name in enumerate(classes)}
        folders.sort(key=lambda folder: positions[folder.name])
    image_list, counts, left_out = list_folders(folders, root)
    if not counts.all():
        empty = folders[int(np.argmin(counts))]
        contents = describe_left_out(list_folders([empty], root)[2])
        raise DataError(
            f"{empty}: this class folder has no image{contents and f' (only {contents})'}; add images, or remove it "
            "from every split"
        )
    return FileDataset(root, image_list, _display_names(root, [folder.name for folder in folders]), left_out)


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
        hint = _unlisted_hint(folder.parent)
        if hint is not None:
            raise DataError(f"{folder}: no such folder, list or table, but {hint}")
        raise DataError(
            f"{folder}: no such folder, list or table; set data.root, data.train and data.val to a folder of class "
            "folders, a list file, a table (.csv, .tsv, .parquet), or a folder of shards. configs/IMAGENET.md explains "
            "how to prepare ImageNet, configs/DATA.md your own images; './run.sh data digits' makes a small data set"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{folder}: has neither class folders nor shards; put images in {folder}/CLASS/")
    return folders


def _unlisted_hint(root: Path) -> str | None:
    """Return what to do with a folder that has both splits, class folders, or lists of them; None for any other."""
    lists = "-o data.train=train_list.txt -o data.val=val_list.txt"
    if all((root / f"{split}_list.txt").is_file() for split in ("train", "val")):
        return f"{root} has the lists that 'data folder' writes; set {lists}"
    if (root / "train").is_dir() and (root / "val").is_dir():
        return f"{root} has the folders train and val; set -o data.train=train -o data.val=val"
    if (root / "train").is_dir() or (root / "val").is_dir() or not root.is_dir():
        return None
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    num_classes = sum(any(_images_in(path, Counter())) for path in folders)
    if num_classes < 2:
        return None
    command = f"./run.sh data folder --root {shlex.quote(str(root))}"
    return (
        f"{root} has {num_classes} folders with images; '{command}' splits and lists them, and then set {lists} "
        "(configs/own_images.yaml does)"
    )


def count_classes(data: DataConfig, split: str) -> int:
    """Return the number of class folders, of a table's names of classes, or the highest label plus 1."""
    path = split_path(data, split)
    if not path.is_file():
        return len(class_folders(path))
    image_list, classes = read_label_file(path, data, split)
    return 1 + int(image_list.labels.values.max(initial=0)) if classes is None else len(classes)


def _check_labels(labels: Labels, path: Path, data: DataConfig, num_classes: int) -> None:
    """Raise DataError for several labels without `data.multi_label`, and for labels outside of the classes."""
    if labels.offsets is not None and not data.multi_label:
        index = int(np.argmax(np.diff(labels.offsets) > 1))
        raise DataError(
            f"{path}: image {index + 1} has several labels; set data.multi_label=true (and loss.name=sigmoid)"
        )
    first = data.first_label
    lowest, highest = int(labels.values.min(initial=num_classes)), int(labels.values.max(initial=-1))
    if lowest < 0:
        raise DataError(
            f"{path}: has a label {lowest + first}, but data.first_label is {first}; set data.first_label=0"
        )
    if first == 0 and lowest == 1 and highest == num_classes:
        raise DataError(
            f"{path}: its labels run from 1 to {num_classes}, and the first class has number 0; set data.first_label=1"
        )
    if highest >= num_classes:
        raise DataError(
            f"{path}: has a label {highest + first}, but model.num_classes is {num_classes} and labels begin at "
            f"{first}; set model.num_classes={highest + 1} or another list"
        )


def describe_empty_classes(images: ImageDataset, source: Path, first_label: int) -> str | None:
    """Return a line that names the classes without any image in a list or table; None if each class has one.

    None, too, for shards, whose labels aren't read in advance.
    """
    if not isinstance(images, FileDataset):
        return None
    counts = images.labels().class_counts(len(images.class_names))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return None
    names = ", ".join(repr(truncate(images.class_names[label])) for label in empty[:_MAX_NAMED_CLASSES].tolist())
    line = f"{source}: {len(empty)} of {len(counts)} classes have no image: {names}"
    line += ", ..." if len(empty) > _MAX_NAMED_CLASSES else ""
    if first_label == 0 and empty.tolist() == [0]:
        line += "; if the labels begin at 1, set data.first_label=1 and one class fewer"
    return escape(line)


def _display_names(root: Path, classes: list[str]) -> list[str]:
    """Return the names that class_names.txt gives to these classes; without one, a class has its own name."""
    names = dict(_class_names(root))
    return [display_name(name_of_folder(names, name) or name) for name in classes]


def _class_names(root: Path) -> list[tuple[str, str]]:
    """Return folder and name of each class from class_names.txt, in label order; empty if there is no such file."""
    path = root / CLASS_NAMES_FILE
    return [(folder, name) for folder, name in read_class_names(path) if name] if path.is_file() else []


def named_folders(root: Path) -> list[str]:
    """Return the folder of each class from class_names.txt, in label order; empty if there is no such file."""
    return [folder for folder, _ in _class_names(root)]


def read_class_names(path: Path) -> list[tuple[str, str]]:
    """Return folder and name of each class in a class_names.txt, in label order. Raise DataError if it isn't text.

    A line is 'FOLDER NAME', or 'FOLDER<tab>NAME', in which both may have spaces anywhere (`class_line`). The name is
    empty if a line has only one word; blank lines are left out.
    """
    try:
        lines = read_lines(path)
    except ValueError:
        raise DataError(
            f"{path}: is not UTF-8 text; write it again, with one line per class: its folder and its name"
        ) from None
    classes = []
    for line in filter(str.strip, lines):
        folder, tab, name = line.partition("\t")
        if not tab:
            folder, _, name = line.strip().partition(" ")
            name = name.strip()
        classes.append((folder, name))
    return classes


def class_line(folder: str, name: str) -> str:
    """Return the line of a class in class_names.txt, 'FOLDER NAME'; the separator is a tab where spaces matter."""
    folder, name = folder.translate(_LINE_ESCAPES), name.translate(_LINE_ESCAPES)
    has_spaces = any(map(str.isspace, folder)) or name != name.strip()
    return f"{folder}\t{name}" if has_spaces else f"{folder} {name}"


def name_of_folder(names: Mapping[str, str], folder: str) -> str | None:
    """Return the name of a class folder, whose line may have underscores for its spaces, as earlier versions wrote."""
    return names.get(folder.translate(_LINE_ESCAPES), names.get("_".join(folder.split())))


def _names_by_label(root: Path, num_classes: int) -> list[str]:
    """Return the class names of a dataset without class folders: those of class_names.txt if their number is right."""
    names = [name for _, name in _class_names(root)]
    return list(map(display_name, names)) if len(names) == num_classes else [str(label) for label in range(num_classes)]


def check_command(data: DataConfig) -> str:
    """Return the command that reads all images of a dataset."""
    defaults = DataConfig()
    columns = [data.label_column] if isinstance(data.label_column, str) else data.label_column
    values = [(split, name) for split, name in (("train", data.train), ("val", data.val)) if name != split]
    if is_table(Path(data.train)) or is_table(Path(data.val)):
        values += [("path-column", data.path_column)] if data.path_column != defaults.path_column else []
        values += [("label-column", column) for column in columns if data.label_column != defaults.label_column]
        values += [] if data.label_separator is None else [("label-separator", data.label_separator)]
        values += [("label-type", data.label_type)] if data.label_type != defaults.label_type else []
    values += [("first-label", str(data.first_label))] if data.first_label else []
    options = [f" --{name} {shlex.quote(value)}" for name, value in values]
    return f"./run.sh data check {shlex.quote(data.root)}{''.join(options)}"


def _bad_images(data: DataConfig) -> list[str]:
    path = Path(data.root) / CHECK_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        newer = newer_format(report.get("format"), CHECK_FORMAT)
        if newer is not None:
            raise DataError(f"{path}: {newer}; update this program, or create it again with '{check_command(data)}'")
        names = [path_of(problem) for problem in report["problems"] if problem["stops_training"]]
        for name in names:
            os.fsencode(name)
        return names
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({os_reason(error)}), but data.on_bad_image=skip leaves out the images that it "
            f"lists; create it with '{check_command(data)}'"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: is not a report of 'data check'; create it with '{check_command(data)}'") from None
