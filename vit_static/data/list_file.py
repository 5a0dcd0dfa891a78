"""List files, with `PATH LABEL` or `PATH LABEL,LABEL,...` per line, read into arrays without an object per image.

ImageNet-21k's list has 14 million lines, so paths stay bytes of the file, and labels are numbers in one array.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_static.common.errors import DataError

_NEWLINE, _RETURN, _TAB, _SPACE, _COMMA, _ZERO = b"\n\r\t ,0"
_MAX_DIGITS = 9  # of a label, which is an int32
_BAD_LABEL = "must end with a label of digits, nine at most; correct the line"
_BLOCK_BYTES = 1 << 25
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it at the start of UTF-8


@dataclass(frozen=True)
class Labels:
    """The labels of many images: `labels[n]` are those of image n, [num_labels], int32.

    They are `values[offsets[n]:offsets[n + 1]]`. Without offsets, each image has one label, `values[n]`.
    """

    values: np.ndarray  # int32
    offsets: np.ndarray | None = None  # [num_images + 1], int64

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray) -> Labels:
        """Return the labels of images with these numbers of labels, `counts` [num_images]."""
        return cls(values, None if (counts == 1).all() else _offsets(counts))

    def __getitem__(self, index: int) -> np.ndarray:
        if self.offsets is None:
            return self.values[index : index + 1]
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image and the class of every label, [num_labels] each, in the order of the images."""
        if self.offsets is None:
            return np.arange(len(self.values)), self.values
        return np.repeat(np.arange(len(self)), np.diff(self.offsets)), self.values

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Return the number of images of each class, [num_classes], int64."""
        return np.bincount(self.values, minlength=num_classes)

    def select(self, mask: np.ndarray) -> Labels:
        """Return the labels of the images for which `mask` [num_images] is True."""
        if self.offsets is None:
            return Labels(self.values[mask])
        counts = np.diff(self.offsets)
        return Labels(self.values[np.repeat(mask, counts)], _offsets(counts[mask]))


@dataclass(frozen=True)
class ImageList:
    """The paths and labels of many images. The n-th path is `text[starts[n]:stops[n]]`."""

    text: np.ndarray  # uint8
    starts: np.ndarray  # [num_images], int64
    stops: np.ndarray  # [num_images], int64
    labels: Labels

    def __len__(self) -> int:
        return len(self.starts)

    def path(self, index: int) -> bytes:
        return self.text[self.starts[index] : self.stops[index]].tobytes()

    def with_first_label(self, first_label: int) -> ImageList:
        """Return the images with labels from 0 on, where `first_label` was that of the first class."""
        if first_label == 0:
            return self
        labels = Labels(self.labels.values - np.int32(first_label), self.labels.offsets)
        return ImageList(self.text, self.starts, self.stops, labels)

    def select(self, mask: np.ndarray) -> ImageList:
        """Return the images for which `mask` [num_images] is True."""
        return ImageList(self.text, self.starts[mask], self.stops[mask], self.labels.select(mask))


def read_list(path: Path) -> ImageList:
    """Read a list file. The label follows the last space or tab of a line, so that paths may contain spaces.

    Raise DataError, with the number of the line, for a line that isn't a path and its labels.
    """
    try:
        with path.open("rb") as file:
            content: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file can't be mapped
        content = b""
    text = np.frombuffer(content, np.uint8)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: is UTF-16 text; save it as UTF-8")
    max_lines = 1 + sum(np.count_nonzero(text[start:stop] == _NEWLINE) for start, stop in _blocks(content))
    starts, stops = np.empty(max_lines, np.int64), np.empty(max_lines, np.int64)
    counts = np.empty(max_lines, np.int32)
    values, num_lines = [], 0
    for start, stop in _blocks(content):
        block = _Block(text, start, stop, path)
        rows = slice(num_lines, num_lines + len(block.starts))
        starts[rows], stops[rows], counts[rows] = block.starts, block.stops, block.counts
        values.append(block.values)
        num_lines = rows.stop
    if num_lines == 0:
        raise DataError(f"{path}: is an empty list; it must have one line per image, with its path and its label")
    labels = Labels.of(np.concatenate(values), counts[:num_lines])
    return ImageList(text, starts[:num_lines], stops[:num_lines], labels)


def _blocks(content: mmap.mmap | bytes) -> Iterator[tuple[int, int]]:
    """Yield ranges of complete lines, of about _BLOCK_BYTES each."""
    start, end = 3 if content[:3] == _BYTE_ORDER_MARK else 0, len(content)
    while start < end:
        newline = content.find(b"\n", min(start + _BLOCK_BYTES, end))
        stop = end if newline < 0 else newline + 1
        yield start, stop
        start = stop


class _Block:
    """The parsed lines of a range of a list's text.

    Per line: `starts` and `stops` of the path in the whole text, and `counts`, the number of its labels. `values`: the
    labels of all lines, one after the other.
    """

    def __init__(self, text: np.ndarray, start: int, stop: int, path: Path) -> None:
        self._text, self._start, self._path = text, start, path
        block = text[start:stop]
        ends = np.flatnonzero(block == _NEWLINE)
        if not len(ends) or ends[-1] != len(block) - 1:
            ends = np.append(ends, len(block))
        begins = np.concatenate([[0], ends[:-1] + 1])
        ends = ends - ((ends > begins) & (block[np.maximum(ends - 1, 0)] == _RETURN))
        has_text = ends > begins
        begins, ends = begins[has_text], ends[has_text]
        spaces = np.flatnonzero((block == _SPACE) | (block == _TAB))
        last = np.searchsorted(spaces, ends) - 1
        separators = spaces[last] if len(spaces) else np.full(len(ends), -1)
        no_space = (last < 0) | (separators <= begins)
        self._raise_for_first(no_space, begins, "must be a path and a label with a space between them; correct it")
        self.starts, self.stops = start + begins, start + separators
        commas = np.flatnonzero(block == _COMMA)
        comma_lines = np.searchsorted(ends, commas)
        in_labels = (comma_lines < len(ends)) & (commas > separators[np.minimum(comma_lines, len(ends) - 1)])
        commas, comma_lines = commas[in_labels], comma_lines[in_labels]
        self.counts = np.bincount(comma_lines, minlength=len(ends)) + 1
        label_starts = np.sort(np.concatenate([separators, commas])) + 1
        label_stops = np.sort(np.concatenate([commas, ends]))
        lines = np.repeat(np.arange(len(ends)), self.counts)
        num_digits = label_stops - label_starts
        self._raise_for_first((num_digits < 1) | (num_digits > _MAX_DIGITS), begins[lines], _BAD_LABEL)
        self.values = np.zeros(len(num_digits), np.int32)
        for place in range(int(num_digits.max(initial=0))):
            has_digit = num_digits > place
            digits = block[label_stops[has_digit] - 1 - place].astype(np.int32) - _ZERO
            self._raise_for_first((digits < 0) | (digits > 9), begins[lines[has_digit]], _BAD_LABEL)
            self.values[has_digit] += digits * 10**place

    def _raise_for_first(self, is_wrong: np.ndarray, begins: np.ndarray, problem: str) -> None:
        """Raise DataError for the first line that `is_wrong`, if there is one. `begins` are the starts of the lines."""
        if not is_wrong.any():
            return
        begin = self._start + int(begins[np.argmax(is_wrong)])
        number = 1 + int(np.count_nonzero(self._text[:begin] == _NEWLINE))
        line = self._text[begin : begin + 200].tobytes().split(b"\n")[0].decode("utf-8", "replace")
        raise DataError(f"{self._path}, line {number}, {line!r}: {problem}")


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])
