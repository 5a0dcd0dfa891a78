"""WebDataset shards: tar files of images and labels, with DALI's index files beside them.

With shards, a network disk needn't open a million files. A shard needn't be read in order: its index says where in it
each image lies, so an epoch is a shuffle of all images, as with every other source.

    000000.tar   KEY.jpg, KEY.cls, KEY.jpg, ...; a .cls has the label in digits, or several labels with commas between
    000000.idx   'v1.2 NUM_SAMPLES', then one line per sample: 'jpg OFFSET SIZE NAME cls OFFSET SIZE NAME' (v1.1 has no
                 names)
"""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError, os_reason, truncate
from vit_static.data.image_formats import IMAGE_SUFFIXES
from vit_static.data.image_set import ImageDataset, read_at
from vit_static.data.list_file import Labels

UNFINISHED_FILE = ".unfinished.json"  # in a folder that `data shards` has not finished
LABEL_EXTENSION = "cls"
_NUM_LABEL_READERS = 16  # threads: on a network disk, each small read waits for its answer
_MAX_GAP_BYTES = 1 << 16  # between image and label; above it, two reads are faster than one


@dataclass(frozen=True)
class ShardIndex:
    """The positions of a shard's samples, in bytes: arrays [num_samples], int64."""

    image_offsets: np.ndarray
    image_sizes: np.ndarray
    label_offsets: np.ndarray
    label_sizes: np.ndarray


class ShardDataset(ImageDataset):
    """Images in shards, ordered by the names of the shards, then by the position in the shard.

    With `selected`, only the images with these numbers in that order are in the dataset.
    """

    def __init__(
        self,
        shards: list[Path],
        shard_indexes: list[ShardIndex],
        root: Path,
        class_names: list[str],
        multi_label: bool,
        selected: np.ndarray | None = None,
    ) -> None:
        super().__init__(root, class_names)
        self._shards, self._shard_indexes, self._multi_label = shards, shard_indexes, multi_label
        counts = [len(shard_index.image_sizes) for shard_index in shard_indexes]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._selected = selected
        self._descriptors: dict[int, int] = {}
        self._names: tuple[int, list[str]] = (-1, [])  # of one shard: names are mostly asked for in order
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._selected is None else len(self._selected)

    def relative_name(self, index: int) -> str:
        shard, sample = self._locate(index)
        cached_shard, names = self._names
        if cached_shard != shard:
            names = _member_names(self._shards[shard])
            self._names = shard, names
        return f"{os.path.relpath(self._shards[shard], self.root)}/{names[sample]}"

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        shard, sample = self._locate(index)
        shard_index, descriptor = self._shard_indexes[shard], self._descriptor(shard)
        image = int(shard_index.image_offsets[sample]), int(shard_index.image_sizes[sample])
        label = int(shard_index.label_offsets[sample]), int(shard_index.label_sizes[sample])
        start, stop = min(image[0], label[0]), max(sum(image), sum(label))
        if stop - start <= image[1] + label[1] + _MAX_GAP_BYTES:
            both = read_at(descriptor, start, stop - start)
            encoded, text = (both[offset - start : offset - start + size] for offset, size in (image, label))
        else:
            encoded, text = read_at(descriptor, *image), _read_label(descriptor, *label)
        if not len(encoded):
            raise DataError("is empty", "empty")
        return encoded, self._parse_labels(text.tobytes())

    def labels(self) -> Labels:
        """Return the labels of all images, whose files are small parts of the shards, read on several threads."""
        parts = np.array_split(np.arange(len(self)), _NUM_LABEL_READERS)
        with ThreadPoolExecutor(_NUM_LABEL_READERS) as threads:
            labels = [label for part in threads.map(self._read_labels, parts) for label in part]
        counts = np.fromiter(map(len, labels), np.int64, len(labels))
        return Labels.of(np.concatenate(labels), counts)

    def _read_labels(self, indices: np.ndarray) -> list[np.ndarray]:
        labels = []
        for index in indices.tolist():
            shard, sample = self._locate(index)
            shard_index = self._shard_indexes[shard]
            position = int(shard_index.label_offsets[sample]), int(shard_index.label_sizes[sample])
            try:
                labels.append(self._parse_labels(_read_label(self._descriptor(shard), *position).tobytes()))
            except OSError as error:
                raise DataError(f"{self.message_name(index)}: its label can't be read ({os_reason(error)})") from None
            except DataError as error:
                raise DataError(f"{self.message_name(index)}: {error}", error.kind) from None
        return labels

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for shard, index in zip(self._shards, self._shard_indexes, strict=True):
            digest.update(shard.name.encode())
            for array in (index.image_offsets, index.image_sizes, index.label_offsets, index.label_sizes):
                digest.update(array.data)
        if self._selected is not None:
            digest.update(self._selected.data)
        return digest.hexdigest()

    def exclude(self, names: Collection[str]) -> ShardDataset:
        excluded = set(names)
        remaining = np.array([n for n in range(len(self)) if self.relative_name(n) not in excluded], int)
        selected = remaining if self._selected is None else self._selected[remaining]
        return ShardDataset(self._shards, self._shard_indexes, self.root, self.class_names, self._multi_label, selected)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of the shard, and of the sample in it."""
        if self._selected is not None:
            index = int(self._selected[index])
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self._shards[shard], os.O_RDONLY)
            return self._descriptors[shard]

    def _parse_labels(self, text: bytes) -> np.ndarray:
        if self._multi_label and not text.strip():
            return np.empty(0, np.int32)
        try:
            labels = np.array([int(label) for label in text.split(b",")], np.int32)
        except (ValueError, OverflowError):
            shown = text[:40].decode("utf-8", "replace")
            raise DataError(f"its label is {shown!r}, not the number of a class; correct the shard", "label") from None
        if len(labels) > 1 and not self._multi_label:
            raise DataError("has several labels; set data.multi_label=true (and loss.name=sigmoid)", "label")
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise DataError(
                f"has the label {wrong}, but model.num_classes is {len(self.class_names)} and labels begin at 0; set "
                "model.num_classes higher, or, if the labels begin at 1, write the shards again with labels from 0",
                "label",
            )
        return labels

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


def _read_label(descriptor: int, offset: int, size: int) -> np.ndarray:
    """Return a label's bytes, [size] uint8; none for an image without labels."""
    return read_at(descriptor, offset, size) if size else np.empty(0, np.uint8)


def open_shards(folder: Path, root: Path, class_names: list[str], multi_label: bool) -> ShardDataset:
    """Open the shards in a folder. Raise DataError, with the remedy, if a shard's index is missing or doesn't fit."""
    if (folder / UNFINISHED_FILE).exists():
        raise DataError(f"{folder}: is not finished; run the same './run.sh data shards' command again")
    shards = sorted(folder.glob("*.tar"))
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard}: is not a file; put the shard there, or remove it")
    _raise_open_file_limit(len(shards))
    shard_indexes = [read_index(shard) for shard in shards]
    if not any(len(shard_index.image_sizes) for shard_index in shard_indexes):
        raise DataError(f"{folder}: its shards have no images; make them again with './run.sh data shards'")
    return ShardDataset(shards, shard_indexes, root, class_names, multi_label)


def read_index(shard: Path) -> ShardIndex:
    """Read the index beside a shard. Raise DataError if it is missing, damaged, or can't be this shard's."""
    path = shard.with_suffix(".idx")
    if not path.is_file():
        raise DataError(f"{shard}: has no index beside it; make one with './run.sh data shards --index {shard.parent}'")
    lines = _lines(path)
    header = lines[0].split() if lines else []
    if len(header) != 2 or header[0] not in ("v1.1", "v1.2") or header[1] != str(len(lines) - 1):
        raise DataError(
            f"{path}: is not a complete index of version 1.1 or 1.2; remove it, and make it again with "
            "'./run.sh data shards --index'"
        )
    num_fields = 4 if header[0] == "v1.2" else 3
    rows = [_parse_sample(path, line.split(), num_fields) for line in lines[1:]]
    size = shard.stat().st_size
    if any(row[0] + row[1] > size or row[2] + row[3] > size for row in rows):
        raise DataError(
            f"{path}: is the index of another file: it goes beyond the end of {shard.name} ({size} bytes); copy the "
            "shard again, or remove the index and make it again with './run.sh data shards --index'"
        )
    return ShardIndex(*np.array(rows, np.int64).reshape(-1, 4).T.copy())


def _parse_sample(path: Path, fields: list[str], num_fields: int) -> tuple[int, int, int, int]:
    """Return a line's image offset and size, label offset and size. Each component has `num_fields` fields."""
    image = label = None
    for start in range(0, len(fields) - num_fields + 1, num_fields):
        extension = fields[start]
        if extension == LABEL_EXTENSION:
            label = fields[start + 1], fields[start + 2]
        elif image is None and f".{extension.lower()}" in IMAGE_SUFFIXES:
            image = fields[start + 1], fields[start + 2]
    shown = truncate(repr(" ".join(fields)), 120)
    if image is None or label is None:
        missing = "an image" if image is None else f"a label (.{LABEL_EXTENSION})"
        raise DataError(f"{path}: a sample lacks {missing}: {shown}; make the shard again with its images and labels")
    if not all(number.isdecimal() and len(number) < 19 for number in (*image, *label)):
        raise DataError(
            f"{path}: a sample's offset and size are not numbers: {shown}; remove the index, and make it again with "
            "'./run.sh data shards --index'"
        )
    return int(image[0]), int(image[1]), int(label[0]), int(label[1])


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _member_names(shard: Path) -> list[str]:
    """Return the names of a shard's images; if the index has no names, their numbers."""
    lines = [line.split() for line in _lines(shard.with_suffix(".idx"))]
    has_names = lines[0][0] == "v1.2"
    return [_image_name(fields) if has_names else str(number) for number, fields in enumerate(lines[1:])]


def _image_name(fields: list[str]) -> str:
    return next(fields[n + 3] for n in range(0, len(fields), 4) if f".{fields[n].lower()}" in IMAGE_SUFFIXES)


def _raise_open_file_limit(num_files: int) -> None:
    """Let this process open this many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft + num_files
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
