"""Stratified split of images into training and validation, with copies and groups of images in the same split."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

SPLITS = ("train", "val")


@dataclass(frozen=True)
class UserImage:
    """One of the images; `digest`, 16 hexadecimal digits, depends on its content and the seed."""

    path: str
    label: int
    digest: str
    group: str | None = None  # images of the same group stay in the same split


@dataclass
class _Unit:
    """Images that stay in the same split: copies, and the images of a group."""

    counts: Counter[int] = field(default_factory=Counter)  # number of images by label
    digests: set[str] = field(default_factory=set)
    split: str | None = None

    @property
    def position(self) -> str:
        """Uniformly distributed, and independent of the names and the number of the other images."""
        return min(self.digests)


def group_of(path: str, pattern: re.Pattern[str]) -> str | None:
    """Return what the pattern matches in a file's name; None if it doesn't match.

    If the pattern has parentheses, it is what the first one matches that takes part in the match, if any does.
    """
    match = pattern.search(PurePath(path).name)
    if match is None:
        return None
    return next((part for part in match.groups() if part is not None), match.group())


def divide(images: Sequence[UserImage], val_share: float, assigned: dict[str, str]) -> dict[str, list[UserImage]]:
    """Split the images so that validation has its share of each class, at least one image if there are two or more.

    `assigned` has the splits of earlier images by digest, which don't change, and gets those of the new ones. They
    change only where a class would have no training image, or no validation image although there could be one.
    """
    units = _units(images)
    by_label: defaultdict[int, list[_Unit]] = defaultdict(list)
    for unit in units:
        for label in unit.counts:
            by_label[label].append(unit)
        earlier = {assigned[digest] for digest in unit.digests & assigned.keys()}
        unit.split = "train" if "train" in earlier else "val" if earlier else None
    missing = {label: _target(label, of_label, val_share) for label, of_label in by_label.items()}
    for unit in units:
        if unit.split == "val":
            _subtract(missing, unit)
    for unit in units:
        if unit.split is None:
            gain = sum(abs(missing[label]) - abs(missing[label] - count) for label, count in unit.counts.items())
            unit.split = "val" if gain > 0 else "train"
            if unit.split == "val":
                _subtract(missing, unit)
    _put_each_class_in_both(by_label)
    for unit in units:
        assigned |= {digest: str(unit.split) for digest in unit.digests}
    return {split: [image for image in images if assigned[image.digest] == split] for split in SPLITS}


def _target(label: int, units: Sequence[_Unit], val_share: float) -> int:
    """Return how many images of a class should be for validation; `units` are those with images of the class."""
    num_images = sum(unit.counts[label] for unit in units)
    return min(max(1, round(val_share * num_images)), num_images - 1) if len(units) > 1 else 0


def _subtract(missing: dict[int, int], unit: _Unit) -> None:
    for label, count in unit.counts.items():
        missing[label] -= count


def _put_each_class_in_both(by_label: dict[int, list[_Unit]]) -> None:
    """Move a unit where a class has none for training, and then where it has none for validation."""
    for units in by_label.values():
        if all(unit.split == "val" for unit in units):
            max(units, key=lambda unit: unit.position).split = "train"
    for label, units in sorted(by_label.items()):
        if len(units) > 1 and all(unit.split == "train" for unit in units):
            movable = [unit for unit in units if all(_has_other(by_label[other], unit) for other in unit.counts)]
            if movable:
                min(movable, key=lambda unit: (unit.counts[label], unit.position)).split = "val"


def _has_other(units: Iterable[_Unit], unit: _Unit) -> bool:
    """Return whether another unit than this one is for training."""
    return any(other.split == "train" and other is not unit for other in units)


def _units(images: Sequence[UserImage]) -> list[_Unit]:
    """Return the units, by position: images with the same digest or group, directly or through others, are in one."""
    parents: dict[str, str] = {}

    def root_of(key: str) -> str:
        parents.setdefault(key, key)
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for image in images:
        own = root_of(f"digest {image.digest}")
        if image.group is not None:
            parents[own] = root_of(f"group {image.group}")
    units: defaultdict[str, _Unit] = defaultdict(_Unit)
    for image in images:
        unit = units[root_of(f"digest {image.digest}")]
        unit.counts[image.label] += 1
        unit.digests.add(image.digest)
    return sorted(units.values(), key=lambda unit: unit.position)
