"""WebDataset shards: tar files of images and labels, with DALI's index files beside them.

A shard saves the file system of a network disk the opening of a million files. It needn't be read in order: its index
says where in it each image lies, so that an epoch is a shuffle of all images, here as from any other source.

    000000.tar   KEY.jpg, KEY.cls, KEY.jpg, ...; a .cls holds the label in digits, or labels with commas between
    000000.idx   'v1.2 NUM_SAMPLES', then a line a sample: 'jpg OFFSET SIZE NAME cls OFFSET SIZE NAME' (v1.1: no names)
"""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError
from vit_static.data.image_set import IMAGE_SUFFIXES, ImageDataset, read_at

UNFINISHED_FILE = ".unfinished.json"  # in a folder that `data shards` has not finished
LABEL_EXTENSION = "cls"
_LARGEST_GAP = 1 << 16  # bytes between image and label that are rather read than asked for twice


@dataclass(frozen=True)
class Index:
    """Where a shard's samples lie: arrays of a row a sample, [num_samples], int64, in bytes."""

    image_offsets: np.ndarray
    image_sizes: np.ndarray
    label_offsets: np.ndarray
    label_sizes: np.ndarray


class ShardDataset(ImageDataset):
    """Images in shards: by the shards' names, then in the order in which they lie in a shard."""

    def __init__(
        self,
        shards: list[Path],
        indexes: list[Index],
        root: Path,
        class_names: list[str],
        multi_label: bool,
        kept: np.ndarray | None = None,
    ) -> None:
        super().__init__(root, class_names)
        self._shards, self._indexes, self._multi_label = shards, indexes, multi_label
        counts = [len(index.image_sizes) for index in indexes]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._kept = kept  # the numbers of those that are in the set, where not all are
        self._descriptors: dict[int, int] = {}
        self._names: tuple[int, list[str]] = (-1, [])  # of the shard last asked for: most ask for them in order
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._kept is None else len(self._kept)

    def relative_name(self, number: int) -> str:
        shard, place = self._place(number)
        known, names = self._names
        if known != shard:
            names = _member_names(self._shards[shard])
            self._names = shard, names
        return f"{os.path.relpath(self._shards[shard], self.root)}/{names[place]}"

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard, place = self._place(number)
        index, descriptor = self._indexes[shard], self._descriptor(shard)
        image = int(index.image_offsets[place]), int(index.image_sizes[place])
        label = int(index.label_offsets[place]), int(index.label_sizes[place])
        start, stop = min(image[0], label[0]), max(sum(image), sum(label))
        if stop - start <= image[1] + label[1] + _LARGEST_GAP:
            both = read_at(descriptor, start, stop - start)
            encoded, text = (both[offset - start : offset - start + size] for offset, size in (image, label))
        else:
            encoded, text = (read_at(descriptor, offset, size) for offset, size in (image, label))
        if not len(encoded):
            raise DataError("is empty", "empty")
        return encoded, self._labels(text.tobytes())

    def digest(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        for shard, index in zip(self._shards, self._indexes, strict=True):
            found.update(shard.name.encode())
            for array in (index.image_offsets, index.image_sizes, index.label_offsets, index.label_sizes):
                found.update(array.data)
        if self._kept is not None:
            found.update(self._kept.data)
        return found.hexdigest()

    def exclude(self, names: Collection[str]) -> ShardDataset:
        excluded = set(names)
        kept = np.array([number for number in range(len(self)) if self.relative_name(number) not in excluded], int)
        numbers = kept if self._kept is None else self._kept[kept]
        return ShardDataset(self._shards, self._indexes, self.root, self.class_names, self._multi_label, numbers)

    def _place(self, number: int) -> tuple[int, int]:
        """The shard, and the place in it."""
        if self._kept is not None:
            number = int(self._kept[number])
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return shard, number - int(self._starts[shard])

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self._shards[shard], os.O_RDONLY)
            return self._descriptors[shard]

    def _labels(self, text: bytes) -> np.ndarray:
        try:
            labels = np.array([int(label) for label in text.split(b",")], np.int32)
        except (ValueError, OverflowError):
            raise DataError(
                f"its label is {text[:40].decode('utf-8', 'replace')!r}, no number of a class", "label"
            ) from None
        if len(labels) > 1 and not self._multi_label:
            raise DataError("has several labels; set data.multi_label=true (and loss.name=sigmoid)", "label")
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DataError(
                f"has the label {wrong}, where model.num_classes is {len(self.class_names)} and labels "
                "begin at 0; set model.num_classes higher",
                "label",
            )
        return labels

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def open_shards(place: Path, root: Path, class_names: list[str], multi_label: bool) -> ShardDataset:
    """The shards in a folder. Raises DataError, with the remedy, where one has no index, or one that isn't its own."""
    if (place / UNFINISHED_FILE).exists():
        raise DataError(f"{place}: is not finished; give the same './run.sh data shards' command again")
    shards = sorted(place.glob("*.tar"))
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard}: is no file; put the shard there, or take the name away")
    _allow_open_files(len(shards))
    indexes = [read_index(shard) for shard in shards]
    if not any(len(index.image_sizes) for index in indexes):
        raise DataError(f"{place}: its shards hold no images")
    return ShardDataset(shards, indexes, root, class_names, multi_label)


def read_index(shard: Path) -> Index:
    """What a shard's index says, if it can be the shard's."""
    path = shard.with_suffix(".idx")
    if not path.is_file():
        raise DataError(f"{shard}: has no index beside it; make one with './run.sh data shards --index {shard.parent}'")
    lines = _lines(path)
    first = lines[0].split() if lines else []
    if len(first) != 2 or first[0] not in ("v1.1", "v1.2") or first[1] != str(len(lines) - 1):
        raise DataError(f"{path}: is no whole index of version 1.1 or 1.2; make it anew with 'data shards --index'")
    width = 4 if first[0] == "v1.2" else 3
    rows = [_row(path, line.split(), width) for line in lines[1:]]
    size = shard.stat().st_size
    if any(row[0] + row[1] > size or row[2] + row[3] > size for row in rows):
        raise DataError(f"{path}: is another file's index: it goes beyond the end of {shard.name} ({size} bytes)")
    return Index(*np.array(rows, np.int64).reshape(-1, 4).T.copy())


def _row(path: Path, fields: list[str], width: int) -> tuple[int, int, int, int]:
    """Image offset and size, label offset and size of a line, whose components take `width` fields each."""
    image = label = None
    for start in range(0, len(fields) - width + 1, width):
        extension = fields[start]
        if extension == LABEL_EXTENSION:
            label = fields[start + 1], fields[start + 2]
        elif image is None and f".{extension.lower()}" in IMAGE_SUFFIXES:
            image = fields[start + 1], fields[start + 2]
    if image is None or label is None:
        lacking = "an image" if image is None else f"a label (.{LABEL_EXTENSION})"
        raise DataError(f"{path}: a sample lacks {lacking}: {' '.join(fields)[:120]!r}")
    if not all(number.isdecimal() and len(number) < 19 for number in (*image, *label)):
        raise DataError(f"{path}: a sample's place and size are no numbers: {' '.join(fields)[:120]!r}")
    return int(image[0]), int(image[1]), int(label[0]), int(label[1])


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _member_names(shard: Path) -> list[str]:
    """What the images of a shard are called in it; without names in the index, their numbers."""
    lines = [line.split() for line in _lines(shard.with_suffix(".idx"))]
    has_names = lines[0][0] == "v1.2"
    return [_image_name(fields) if has_names else str(number) for number, fields in enumerate(lines[1:])]


def _image_name(fields: list[str]) -> str:
    return next(fields[n + 3] for n in range(0, len(fields), 4) if f".{fields[n].lower()}" in IMAGE_SUFFIXES)


def _allow_open_files(count: int) -> None:
    """Lets this process hold as many shards open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
