"""List files, `PATH LABEL` a line, or `PATH LABEL,LABEL,...`: read into arrays, without an object for each image.

ImageNet-21k's list has 14 million lines: paths stay the file's own bytes, labels are numbers in one array.
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
_NO_LABEL = "must end with a label: digits, nine at most"
_PIECE_BYTES = 1 << 25
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # as some editors begin a file of UTF-8


@dataclass(frozen=True)
class Labels:
    """Labels of many images: those of image n are `values[offsets[n]:offsets[n + 1]]`; without offsets, `values[n]`."""

    values: np.ndarray  # int32
    offsets: np.ndarray | None = None  # [num_images + 1], int64

    def of(self, number: int) -> np.ndarray:
        """An image's labels, [num_labels], int32."""
        if self.offsets is None:
            return self.values[number : number + 1]
        return self.values[self.offsets[number] : self.offsets[number + 1]]

    def where(self, kept: np.ndarray) -> Labels:
        """Those of the images for which `kept` [num_images] is True."""
        if self.offsets is None:
            return Labels(self.values[kept])
        counts = np.diff(self.offsets)
        return Labels(self.values[np.repeat(kept, counts)], _offsets(counts[kept]))


@dataclass(frozen=True)
class ImageList:
    """The lines of a list: path n is `text[starts[n]:stops[n]]`."""

    text: np.ndarray  # uint8
    starts: np.ndarray  # [num_images], int64
    stops: np.ndarray  # [num_images], int64
    labels: Labels

    def __len__(self) -> int:
        return len(self.starts)

    def path(self, number: int) -> bytes:
        return self.text[self.starts[number] : self.stops[number]].tobytes()

    def where(self, kept: np.ndarray) -> ImageList:
        """Those for which `kept` [num_images] is True."""
        return ImageList(self.text, self.starts[kept], self.stops[kept], self.labels.where(kept))


def read_list(path: Path) -> ImageList:
    """A list file. The last blank or tab of a line stands before its label, so that paths may hold blanks.

    Raises DataError, with the number of the line, where a line isn't a path and a label or labels.
    """
    try:
        with path.open("rb") as file:
            content: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file can't be mapped
        content = b""
    text = np.frombuffer(content, np.uint8)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: is UTF-16 text; write it anew as UTF-8")
    most = 1 + sum(np.count_nonzero(text[start:stop] == _NEWLINE) for start, stop in _pieces(content))
    starts, stops, counts = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int32)
    values, num_lines = [], 0
    for start, stop in _pieces(content):
        piece = _Piece(text, start, stop, path)
        here = slice(num_lines, num_lines + len(piece.starts))
        starts[here], stops[here], counts[here] = piece.starts, piece.stops, piece.counts
        values.append(piece.values)
        num_lines = here.stop
    if num_lines == 0:
        raise DataError(f"{path}: is an empty list; it must hold a line an image, its path and its label")
    counts = counts[:num_lines]
    labels = Labels(np.concatenate(values), None if (counts == 1).all() else _offsets(counts))
    return ImageList(text, starts[:num_lines], stops[:num_lines], labels)


def _pieces(content: mmap.mmap | bytes) -> Iterator[tuple[int, int]]:
    """Stretches of whole lines, of about _PIECE_BYTES each."""
    start, end = 3 if content[:3] == _BYTE_ORDER_MARK else 0, len(content)
    while start < end:
        newline = content.find(b"\n", min(start + _PIECE_BYTES, end))
        stop = end if newline < 0 else newline + 1
        yield start, stop
        start = stop


class _Piece:
    """What `read_list` finds in a stretch of a list's text: arrays of a row a line or, `values`, a label."""

    def __init__(self, text: np.ndarray, start: int, stop: int, path: Path) -> None:
        self._text, self._start, self._path = text, start, path
        self._piece = piece = text[start:stop]
        ends = np.flatnonzero(piece == _NEWLINE)
        if not len(ends) or ends[-1] != len(piece) - 1:
            ends = np.append(ends, len(piece))
        begins = np.concatenate([[0], ends[:-1] + 1])
        ends = ends - ((ends > begins) & (piece[np.maximum(ends - 1, 0)] == _RETURN))
        is_line = ends > begins
        begins, ends = begins[is_line], ends[is_line]
        blanks = np.flatnonzero((piece == _SPACE) | (piece == _TAB))
        last = np.searchsorted(blanks, ends) - 1
        between = blanks[last] if len(blanks) else np.full(len(ends), -1)
        self._refuse((last < 0) | (between <= begins), begins, "has no path and label, with a blank between them")
        self.starts, self.stops = start + begins, start + between
        commas = np.flatnonzero(piece == _COMMA)
        of_line = np.searchsorted(ends, commas)
        in_label = (of_line < len(ends)) & (commas > between[np.minimum(of_line, len(ends) - 1)])
        commas, of_line = commas[in_label], of_line[in_label]
        self.counts = np.bincount(of_line, minlength=len(ends)) + 1
        first = np.sort(np.concatenate([between, commas])) + 1
        behind = np.sort(np.concatenate([commas, ends]))
        lines = np.repeat(np.arange(len(ends)), self.counts)
        widths = behind - first
        self._refuse((widths < 1) | (widths > _MAX_DIGITS), begins[lines], _NO_LABEL)
        self.values = np.zeros(len(widths), np.int32)
        for place in range(int(widths.max(initial=0))):
            has = widths > place
            digit = piece[behind[has] - 1 - place].astype(np.int32) - _ZERO
            self._refuse((digit < 0) | (digit > 9), begins[lines[has]], _NO_LABEL)
            self.values[has] += digit * 10**place

    def _refuse(self, wrong: np.ndarray, begins: np.ndarray, what: str) -> None:
        """Raises DataError for the first of the lines that begin at `begins` and are `wrong`."""
        if not wrong.any():
            return
        at = self._start + int(begins[np.argmax(wrong)])
        number = 1 + int(np.count_nonzero(self._text[:at] == _NEWLINE))
        line = self._text[at : at + 200].tobytes().split(b"\n")[0].decode("utf-8", "replace")
        raise DataError(f"{self._path}, line {number}, {line!r}: {what}")


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])
