"""Tables of images and their labels: CSV, TSV and Parquet files with named columns."""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.errors import DataError, format_value, truncate
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_formats import is_image_name
from vit_static.data.list_file import ImageList, Labels

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_CLASS_NUMBER = re.compile(r"([0-9]{1,9})(\.0+)?")  # 3.0: numbers with gaps between them, as pandas writes them
_BOOLEANS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}
_MAX_SHOWN_COLUMNS = 8
_SEVERAL_LABELS = "has several labels; set data.multi_label=true (and loss.name=sigmoid)"


def is_table(path: Path) -> bool:
    """Return whether this is the path of a table rather than of a list file, by its suffix."""
    return path.suffix.lower() in TABLE_SUFFIXES


@dataclass(frozen=True)
class Table:
    """A table's images, and the text of their labels: the label n of `images.labels` is `texts[n]`."""

    path: Path
    images: ImageList
    texts: list[str]
    places: list[str]  # where each text occurs first, for messages
    has_class_columns: bool

    def class_names(self, label_type: str) -> list[str] | None:
        """Return the classes that these labels define, as `data.label_type` says; None if the labels are numbers.

        They are the columns of the classes, in the order of the config, or the texts, sorted as class folders are.
        """
        if self.has_class_columns:
            return self.texts
        is_number = all(_CLASS_NUMBER.fullmatch(text) for text in self.texts)
        return None if label_type == "number" or (label_type == "auto" and is_number) else sorted(self.texts)

    def with_classes(self, names: Sequence[str], source: Path) -> ImageList:
        """Return the images labelled with their class's position in `names`.

        Raise DataError, with the row, for a label that isn't among them. `source` is what defines the classes.
        """
        numbers = {name: number for number, name in enumerate(names)}
        for text, place in zip(self.texts, self.places, strict=True):
            if text not in numbers:
                raise DataError(
                    f"{place}: the class {truncate(text)!r} isn't one of the {len(names)} classes of {source}; correct "
                    "it, or add the class there"
                )
        return self._relabelled([numbers[text] for text in self.texts])

    def with_numbers(self, first_label: int) -> ImageList:
        """Return the images labelled with the numbers that the texts are; `first_label` is the number of class 0.

        Raise DataError, with the row, for a text that isn't a number.
        """
        numbers = []
        for text, place in zip(self.texts, self.places, strict=True):
            match = _CLASS_NUMBER.fullmatch(text)
            if match is None:
                raise DataError(
                    f"{place}: the label {truncate(text)!r} isn't a class number of nine digits at most, as other "
                    "labels are; correct it, or set data.label_type=name"
                )
            numbers.append(int(match[1]) - first_label)
        return self._relabelled(numbers)

    def _relabelled(self, numbers: Sequence[int]) -> ImageList:
        labels = self.images.labels
        values = np.array(numbers, np.int32)[labels.values]
        return ImageList(self.images.text, self.images.starts, self.images.stops, Labels(values, labels.offsets))


def read_table(path: Path, data: DataConfig) -> Table:
    """Read the columns `data.path_column` and `data.label_column` of a table.

    Raise DataError, with the row, for a row that isn't an image and its labels, and if a column is missing.
    """
    class_columns = None if isinstance(data.label_column, str) else data.label_column
    columns = [data.path_column, *(class_columns or [str(data.label_column)])]
    rows = _parquet_rows if path.suffix.lower() == ".parquet" else _csv_rows
    text, stops, labels, counts = bytearray(), array("q"), array("i"), array("i")
    numbers = {} if class_columns is None else {name: number for number, name in enumerate(class_columns)}
    places = [str(path)] * len(numbers)
    for place, (image, *cells) in rows(path, columns):
        text += _path_bytes(image, place)
        stops.append(len(text))
        if class_columns is None:
            names = _labels_in(cells[0], data.label_separator, place)
        else:
            names = [
                name for name, cell in zip(class_columns, cells, strict=True) if _boolean(cell, f"{place}, {name!r}")
            ]
        if not data.multi_label and len(names) != 1:
            raise DataError(f"{place}: {_SEVERAL_LABELS if names else 'has no label; add it, or remove the row'}")
        for name in names:
            if name not in numbers:
                if not name.isprintable():
                    raise DataError(f"{place}: the label {truncate(name)!r} is no printable UTF-8 text; correct it")
                numbers[name] = len(numbers)
                places.append(place)
            labels.append(numbers[name])
        counts.append(len(names))
    if not counts:
        raise DataError(f"{path}: has no rows; it must have one row per image")
    ends = np.array(stops, np.int64)
    images = ImageList(
        np.frombuffer(bytes(text), np.uint8),
        np.concatenate([[0], ends[:-1]]),
        ends,
        Labels.of(np.array(labels, np.int32), np.array(counts, np.int32)),
    )
    return Table(path, images, list(numbers), places, class_columns is not None)


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield each row's place, for messages, and its cells of these columns."""
    with path.open("rb") as binary:
        if binary.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}: is UTF-16 text; save it as UTF-8")
    # The names of files may be any bytes.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(file.readline(), columns[0])
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        place = f"{path}, line 1"
        try:
            header = [name.strip() for name in next(reader, [])]
            positions = _positions(path, header, columns)
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{place}: has {len(row)} cells, but the first line names {len(header)} columns; correct it "
                        "(a cell that contains the separator must be in double quotes)"
                    )
                yield place, [row[position] for position in positions]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: can't be read ({error}); correct it") from None


def _delimiter(header: str, path_column: str) -> str:
    """Return the separator with which the header has the column of the paths: Excel's depends on the language."""
    columns = {delimiter: [name.strip().strip('"') for name in header.split(delimiter)] for delimiter in ",;\t"}
    return max(columns, key=lambda delimiter: (path_column in columns[delimiter], len(columns[delimiter])))


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield each row's place, for messages, and its cells of these columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: {error}; Parquet files need it: run 'pip install pyarrow', or save a CSV") from None
    number = 0
    with _parquet_errors(path, pyarrow.ArrowException), pyarrow.parquet.ParquetFile(path) as file:
        _positions(path, file.schema_arrow.names, columns)
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
            for cells in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                number += 1
                yield f"{path}, row {number}", list(cells)


@contextmanager
def _parquet_errors(path: Path, arrow_error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, arrow_error, ValueError) as error:
        raise DataError(f"{path}: can't be read as a Parquet file ({truncate(str(error))}); write it again") from None


def _positions(path: Path, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Return the positions of these columns. Raise DataError if one is missing or ambiguous."""
    for number, name in enumerate(columns):
        if header.count(name) != 1:
            key = "data.path_column" if number == 0 else "data.label_column"
            shown = ", ".join(map(repr, header[:_MAX_SHOWN_COLUMNS])) + ", ..." * (len(header) > _MAX_SHOWN_COLUMNS)
            if any(is_image_name(cell) for cell in header):
                raise DataError(
                    f"{path}: has no line of column names, but begins with {truncate(shown, 300)}; add one, such as "
                    f"'{','.join(columns)}'"
                )
            problem = (
                f"has no column {name!r}, but {truncate(shown, 300)}"
                if name not in header
                else (f"has several columns {name!r}; rename all but one")
            )
            raise DataError(f"{path}: {problem}; set {key} to one of its columns")
    return [header.index(name) for name in columns]


def _path_bytes(cell: Any, place: str) -> bytes:
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{place}: has no path but {format_value(cell)}; correct it, or remove the row")
    return cell.encode("utf-8", "surrogateescape")


def _labels_in(cell: Any, separator: str | None, place: str) -> list[str]:
    """Return the labels in a cell: text, possibly with separators, a number, or (in Parquet) a list of these."""
    cells = cell if isinstance(cell, list) else [cell]
    labels: dict[str, None] = {}
    for value in cells:
        text = _label_text(value, place)
        for part in text.split(separator) if separator else [text]:
            if part.strip():
                labels[part.strip()] = None
    return list(labels)


def _label_text(value: Any, place: str) -> str:
    if value is None or value != value:  # NaN: a missing number
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, int | float):
        return str(int(value)) if value == int(value) else str(value)
    raise DataError(f"{place}: {format_value(value)} is no label; it must be text or a number")


def _boolean(cell: Any, place: str) -> bool:
    """Return whether an image has the class of a column."""
    value = _BOOLEANS.get(_label_text(cell, place).strip().lower())
    if value is None:
        raise DataError(f"{place}: is {format_value(cell)}; the column of a class must have 0 or 1")
    return value
