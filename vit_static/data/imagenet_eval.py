"""ReaL labels and ImageNet-V2."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError, os_reason
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.list_file import ImageList, Labels
from vit_static.data.open_set import class_folders, list_folders

_VALIDATION_IMAGE = re.compile(rb"ILSVRC2012_val_(\d{8})\.[A-Za-z]+")


def with_real_labels(images: ImageDataset, path: Path, num_classes: int) -> FileDataset:
    """Return ImageNet-1k's validation images with their ReaL labels (arXiv 2006.07159).

    An image may have several labels; images for which ReaL has none are left out. A prediction counts as correct if
    the most probable class is among the labels. `path` is real.json of google-research/reassessed-imagenet: a list of
    lists, in which item n - 1 has the labels of image n. Raise DataError if the file isn't such a list, or if the name
    of an image doesn't have its number.
    """
    if not isinstance(images, FileDataset):
        raise DataError("--real: needs the validation images as files, which have their numbers as names; set data.val")
    try:
        real_labels = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(real_labels, list) or not all(type(label) is int for item in real_labels for label in item):
            raise TypeError
        counts = np.array([len(item) for item in real_labels])
        values = np.array([label for item in real_labels for label in item], np.int32)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({os_reason(error)}); give ReaL's real.json as --real") from None
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{path}: is not a list of lists of labels; give ReaL's real.json as --real") from None
    if len(values) == 0 or values.min() < 0 or values.max() >= num_classes:
        raise DataError(
            f"{path}: has labels beyond the model's {num_classes} classes; ReaL labels are those of ImageNet-1k, so "
            "use a model with its 1,000 classes"
        )
    real_indices = np.zeros(len(images), np.int64)
    for index in range(len(images)):
        match = _VALIDATION_IMAGE.fullmatch(os.path.basename(images.image_list.path(index)))  # noqa: PTH119 - bytes
        if match is None or not 1 <= int(match[1]) <= len(counts):
            raise DataError(
                f"{images.name(index)}: isn't called ILSVRC2012_val_N.JPEG with N from 1 to {len(counts)}, and {path} "
                "has its labels by that number; set data.root and data.val to the original validation images"
            )
        real_indices[index] = int(match[1]) - 1
    starts = np.concatenate([[0], np.cumsum(counts)])
    selected = [values[starts[n] : starts[n + 1]] for n in real_indices]
    offsets = np.concatenate([[0], np.cumsum(counts[real_indices])])
    old = images.image_list
    relabelled = ImageList(old.text, old.starts, old.stops, Labels(np.concatenate(selected), offsets))
    return FileDataset(images.root, relabelled.select(counts[real_indices] > 0), images.class_names)


def imagenet_v2(folder: Path, class_names: list[str]) -> FileDataset:
    """Return ImageNet-V2's images (arXiv 1902.10811), whose class folders have the numbers of the classes as names.

    Raise DataError if the folders aren't those of the model's classes.
    """
    folders = class_folders(folder)
    expected = {str(label) for label in range(len(class_names))}
    differing = sorted({path.name for path in folders} ^ expected)
    if differing:
        raise DataError(
            f"{folder}: must have one folder for each of the model's {len(class_names)} classes, called 0, 1, 2, ..., "
            f"but differs in {differing[0]!r}; give ImageNet-V2's folder, or another model"
        )
    image_list, *_ = list_folders(sorted(folders, key=lambda path: int(path.name)), folder)
    return FileDataset(folder, image_list, class_names)
