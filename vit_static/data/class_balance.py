"""The weights of the training loss, from the numbers of images per class or from a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_static.common.errors import ConfigError, DataError, os_reason, truncate
from vit_static.config.data_schema import LossConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.list_file import Labels
from vit_static.model.loss_weights import LossWeights, balanced_class_weights, balanced_pos_weights, mean_image_weight


def loss_weights(loss: LossConfig, images: ImageDataset) -> LossWeights:
    """Return the weights that a config asks for, for these training images.

    Class weights are scaled so that the mean weight of the images is 1 (those without labels have that weight). Then
    the loss of a batch is a plain mean, with the same value on every mesh, and the learning rate has its usual meaning.
    Raise ConfigError if a class has no image from which its weight could be computed, and for a file without one number
    above 0 per class.
    """
    pos_number = loss.pos_weight_number
    if loss.class_weights == "none" and pos_number == 1.0:
        return LossWeights()
    names = images.class_names
    labels = images.labels() if loss.class_weights != "none" or pos_number is None else None
    classes = positives = None
    if loss.class_weights != "none":
        assert labels is not None
        classes = _class_weights(loss.class_weights, labels, names).astype(np.float32)
    if pos_number is not None:
        positives = None if pos_number == 1.0 else np.full(len(names), pos_number, np.float32)
    elif loss.pos_weight == "balanced":
        assert labels is not None
        counts = _counts("loss.pos_weight", labels, names)
        if (counts == len(labels)).any():
            name = names[int(np.argmax(counts == len(labels)))]
            raise ConfigError(
                f"loss.pos_weight = balanced: all training images have the class {name!r}; remove that class, or give "
                "a file with a weight for each class"
            )
        positives = balanced_pos_weights(counts, len(labels)).astype(np.float32)
    else:
        positives = read_class_weights(Path(loss.pos_weight), "loss.pos_weight", names).astype(np.float32)
    return LossWeights(classes, positives)


def require_weight_files(loss: LossConfig) -> None:
    """Raise ConfigError for a file of weights that can't be opened; what it must contain depends on the images."""
    for key in ("class_weights", "pos_weight"):
        setting = getattr(loss, key)
        if setting in ("none", "balanced") or (key == "pos_weight" and loss.pos_weight_number is not None):
            continue
        try:
            Path(setting).open("rb").close()
        except OSError as error:
            raise _unreadable(Path(setting), f"loss.{key}", error) from None


def _class_weights(setting: str, labels: Labels, names: Sequence[str]) -> np.ndarray:
    """Return the class weights of `balanced` or of a file, scaled so that the mean over the images is 1, float64."""
    if setting == "balanced":
        weights = balanced_class_weights(_counts("loss.class_weights", labels, names))
    else:
        weights = read_class_weights(Path(setting), "loss.class_weights", names)
    return weights / mean_image_weight(*labels.pairs(), weights)


def _counts(key: str, labels: Labels, names: Sequence[str]) -> np.ndarray:
    counts = labels.class_counts(len(names))
    if not counts.all():
        empty = names[int(np.argmin(counts))]
        raise ConfigError(
            f"{key} = balanced: the class {empty!r} has no training image; add images, remove the class, or give a file"
            " with a weight for each class"
        )
    return counts


def read_class_weights(path: Path, key: str, names: Sequence[str]) -> np.ndarray:
    """Read one number above 0 per class, [num_classes], float64.

    Each line is either a number, in the order of the classes, or a class's name, a space and its number. Raise
    DataError, with the number of the line, for anything else.
    """
    try:
        lines = [
            (number, line.strip())
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
            if line.strip()
        ]
    except OSError as error:
        raise _unreadable(path, key, error) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; {key} takes a file with one number per class") from None
    has_names = any(len(line.split()) > 1 for _, line in lines)
    labels = {name: label for label, name in enumerate(names)}
    weights = np.full(len(names), np.nan)
    for position, (number, line) in enumerate(lines):
        *name, text = line.rsplit(maxsplit=1)
        where = f"{path}, line {number}, {truncate(line)!r}"
        if has_names and (not name or name[0] not in labels):
            raise DataError(f"{where}: must be the name of one of the {len(names)} classes, a space and a number")
        label = labels[name[0]] if has_names else position
        if label >= len(names):
            raise DataError(
                f"{where}: is one number too many; {path.name} must have one for each of {len(names)} classes"
            )
        if not math.isnan(weights[label]):
            raise DataError(f"{where}: is the second weight of this class; remove one of the lines")
        weights[label] = _positive_number(text, where)
    if np.isnan(weights).any():
        missing = names[int(np.argmax(np.isnan(weights)))]
        raise DataError(
            f"{path}: has no weight for the class {missing!r}; write one number for each of {len(names)} classes"
        )
    return weights


def _unreadable(path: Path, key: str, error: OSError) -> ConfigError:
    return ConfigError(f"{key} = {path}: can't be read ({os_reason(error)}); set none, balanced or a file of weights")


def _positive_number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise DataError(f"{where}: must end with a number above 0; correct the line")
    return value
