"""Further validation sets of a run (eval.also): ReaL labels, ImageNet-V2, -A, -R, -Sketch, -C, or any class folders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import FileDataset, ImageDataset
from vit_static.data.imagenet_eval import imagenet_v2, with_real_labels
from vit_static.data.list_file import ImageList, Labels
from vit_static.data.open_set import class_folders, has_shards, list_folders, named_folders, split_path

SEVERITIES = ("1", "2", "3", "4", "5")  # of ImageNet-C's corruptions, the names of its folders
# AlexNet's top-1 error for each of ImageNet-C's corruptions, averaged over the severities: the denominators of the mean
# corruption error (arXiv 1903.12261, section 4.1; the unrounded figures are those of its repository,
# hendrycks/robustness).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


@dataclass(frozen=True)
class ExtraSet:
    """A further validation set."""

    name: str
    parts: dict[str, ImageDataset]  # one without a name; of ImageNet-C, one per corruption and severity: fog/3
    classes: np.ndarray | None = None  # the labels that occur, among which a prediction is chosen; None: all of them
    has_several_labels: bool = False  # a prediction is correct if it is one of an image's labels

    @property
    def is_corrupted(self) -> bool:
        """Return whether the parts are ImageNet-C's."""
        return "" not in self.parts

    @property
    def num_images(self) -> int:
        return sum(len(part) for part in self.parts.values())


def open_extra_sets(also: Mapping[str, str], data: DataConfig, val_images: ImageDataset) -> tuple[ExtraSet, ...]:
    """Open the sets of eval.also. Raise DataError, with the name of the set, for one that doesn't fit the classes.

    A file has ReaL labels of the validation images. A folder has class folders, called as those of the validation
    images or, in ImageNet-V2, by their numbers. If only some of the classes have a folder, a prediction is chosen among
    these, as ImageNet-A and -R define it (arXiv 1907.07174, 2006.16241). A folder of corruptions with the severities 1
    to 5 is ImageNet-C, or like it.
    """
    sets = []
    for name, path in also.items():
        try:
            sets.append(_open(name, Path(path), data, val_images))
        except DataError as error:
            raise DataError(f"eval.also.{name}: {error}") from None
    return tuple(sets)


def _open(name: str, path: Path, data: DataConfig, val_images: ImageDataset) -> ExtraSet:
    class_names = val_images.class_names
    if path.is_file():
        return ExtraSet(name, {"": with_real_labels(val_images, path, len(class_names))}, has_several_labels=True)
    folders = class_folders(path)
    corrupted = _severities(path)
    known = _folder_names(data, class_names)
    names = {folder.name for folder in folders}
    if not names & set(known) and names == set(map(str, range(len(class_names)))):
        return ExtraSet(name, {"": imagenet_v2(path, class_names)})
    if not names & set(known) and corrupted:
        parts = {part: _by_folder(folder, known, class_names)[0] for part, folder in corrupted.items()}
        return ExtraSet(name, dict(parts))
    images, classes = _by_folder(path, known, class_names)
    return ExtraSet(name, {"": images}, classes if len(classes) < len(class_names) else None)


def _severities(path: Path) -> dict[str, Path]:
    """Return the folders of ImageNet-C's severities, by CORRUPTION/SEVERITY; none if the layout is another."""
    for pattern in ("*/[1-5]", "*/*/[1-5]"):  # the archives group the corruptions: noise/shot_noise
        folders = sorted(folder for folder in path.glob(pattern) if folder.is_dir())
        if folders:
            return {f"{folder.parent.name}/{folder.name}": folder for folder in folders}
    return {}


def _folder_names(data: DataConfig, class_names: list[str]) -> list[str]:
    """Return the name of each class's folder, in label order: of the data set, else as class_names.txt gives them."""
    for split in ("val", "train"):
        path = split_path(data, split)
        if path.is_dir() and not has_shards(path):
            return [folder.name for folder in class_folders(path)]
    names = named_folders(Path(data.root))
    return names if len(names) == len(class_names) else class_names


def _by_folder(path: Path, known: list[str], class_names: list[str]) -> tuple[FileDataset, np.ndarray]:
    """Return the images of class folders whose names are among the known ones, and the labels that occur."""
    labels = {name: label for label, name in enumerate(known)}
    folders = class_folders(path)
    unknown = [folder.name for folder in folders if folder.name not in labels]
    if unknown:
        raise DataError(
            f"{path}: has a folder {unknown[0]!r}, which is none of the model's classes; its class folders must be "
            f"called like those of the validation images, such as {known[0]!r}"
        )
    classes = np.array([labels[folder.name] for folder in folders], np.int32)
    image_list, counts, left_out = list_folders(folders, path)
    if not counts.any():
        raise DataError(f"{path}: has no images in its class folders; give another folder")
    relabelled = ImageList(
        image_list.text, image_list.starts, image_list.stops, Labels(classes[image_list.labels.values])
    )
    return FileDataset(path, relabelled, class_names, left_out), np.sort(classes)


def mean_corruption_errors(accuracies: Mapping[str, float]) -> tuple[float, float | None]:
    """Return the mean error over corruptions and ImageNet-C's mean corruption error (mCE), both 0-1.

    `accuracies`: the accuracy 0-1 of each part, called CORRUPTION/SEVERITY. Of each corruption the error is averaged
    over its severities; for the mCE it is divided by AlexNet's before the mean over the corruptions. The mCE is None
    unless there are exactly the 15 corruptions of the benchmark in all five severities.
    """
    severities: dict[str, list[float]] = {}
    for part, accuracy in accuracies.items():
        severities.setdefault(part.split("/")[0], []).append(1.0 - accuracy)
    errors = {corruption: math.fsum(values) / len(values) for corruption, values in severities.items()}
    mean_error = math.fsum(errors.values()) / len(errors)
    if errors.keys() != ALEXNET_ERRORS.keys() or any(len(each) != len(SEVERITIES) for each in severities.values()):
        return mean_error, None
    return mean_error, math.fsum(errors[name] / ALEXNET_ERRORS[name] for name in errors) / len(errors)
