"""ImageNet's other judges: the ReaL labels of its validation images, and ImageNet-V2's images."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.list_file import Labels
from vit_static.data.open_set import class_folders, list_folders

_VALIDATION_IMAGE = re.compile(rb"ILSVRC2012_val_(\d{8})\.[A-Za-z]+")


def with_real_labels(images: ImageDataset, path: Path, num_classes: int) -> FileDataset:
    """ImageNet-1k's validation images with all labels that ReaL has for each (arXiv 2006.07159), without those for
    which it has none. A hit is an image whose first class is among them.

    `path` is real.json of google-research/reassessed-imagenet: a list of lists, that of image n at n - 1. Raises
    DataError where it is none, or an image's number isn't in its name.
    """
    if not isinstance(images, FileDataset):
        raise DataError("--real: wants the validation images as files, whose names have their numbers; set data.val")
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(labels, list) or not all(type(label) is int for of_image in labels for label in of_image):
            raise TypeError
        counts = np.array([len(of_image) for of_image in labels])
        values = np.array([label for of_image in labels for label in of_image], np.int32)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); --real takes ReaL's real.json") from None
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{path}: is no list of lists of labels; --real takes ReaL's real.json") from None
    if len(values) == 0 or values.min() < 0 or values.max() >= num_classes:
        raise DataError(f"{path}: has labels beyond the model's {num_classes} classes; ReaL's are of ImageNet-1k")
    of_each = np.zeros(len(images), np.int64)
    for number in range(len(images)):
        found = _VALIDATION_IMAGE.fullmatch(os.path.basename(images.image_list.path(number)))  # noqa: PTH119 - bytes
        if found is None or not 1 <= int(found[1]) <= len(counts):
            raise DataError(
                f"{images.name(number)}: isn't ILSVRC2012_val_N.JPEG with N from 1 to {len(counts)}, by which {path} "
                "counts its labels"
            )
        of_each[number] = int(found[1]) - 1
    starts = np.concatenate([[0], np.cumsum(counts)])
    chosen = [values[starts[place] : starts[place + 1]] for place in of_each]
    offsets = np.concatenate([[0], np.cumsum(counts[of_each])])
    relabelled = Labels(np.concatenate(chosen), offsets)
    lines = images.image_list
    lines = type(lines)(lines.text, lines.starts, lines.stops, relabelled)
    return FileDataset(images.root, lines.where(counts[of_each] > 0), images.class_names)


def imagenet_v2(folder: Path, class_names: list[str]) -> FileDataset:
    """ImageNet-V2's images (arXiv 1902.10811): class folders that are called by the classes' numbers.

    Raises DataError where they aren't those of the model's classes.
    """
    folders = class_folders(folder)
    expected = {str(label) for label in range(len(class_names))}
    odd = sorted({path.name for path in folders} ^ expected)
    if odd:
        raise DataError(
            f"{folder}: must have a folder for each of the model's {len(class_names)} classes, called 0, 1, 2, ..., "
            f"but differs in {odd[0]!r}"
        )
    lines, _ = list_folders(sorted(folders, key=lambda path: int(path.name)), folder)
    return FileDataset(folder, lines, class_names)
