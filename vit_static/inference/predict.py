"""The verb `predict`: predictions as JSON, CSV or a table."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from vit_static.common.errors import AtLeast, PredictError
from vit_static.common.io import write_atomically
from vit_static.common.terminal import print_table
from vit_static.common.text import csv_cell, csv_row, escape_within, json_line, path_fields, print_line, say
from vit_static.config.schema import BackendChoice, InferencePrecision
from vit_static.inference.image_io import find_images, read_path_list
from vit_static.inference.predictor import Prediction, Predictor, load_predictor
from vit_static.inference.probabilities import DEFAULT_TOP_K
from vit_static.model.variants import shape_of

OutputFormat = Literal["json", "csv", "table"]
_MAX_NAME_WIDTH = 24  # characters of a class name in the table


def predict_images(
    folder: Path,
    paths: Sequence[Path],
    top_k: int | None,
    batch_size: int,
    output_format: OutputFormat = "json",
    features: Path | None = None,
    precision: InferencePrecision | None = None,
    backend: BackendChoice = "auto",
) -> int:
    """Write one line per image to stdout and return the exit code.

    `-` among the paths stands for a list of paths on stdin. An image that can't be read gets a line with the reason,
    the others are still predicted, and the exit code is 2. `features` is a .npy file to write, [number of lines, width]
    float32, whose rows are NaN where the line has an error.
    """
    if (top_k is not None and top_k < 1) or batch_size < 1:
        raise PredictError("--top-k and --batch-size must be at least 1")
    predictor = load_predictor(folder, precision=precision, backend=backend, usual_batch_size=batch_size)
    if not predictor.spec.class_names and features is None:
        raise PredictError(f"{folder}: has no classification head; --features OUT.npy writes the features")
    num_columns = None  # of classes in CSV; None: their number differs between images
    if top_k is not None or predictor.spec.thresholds is None:
        num_columns = min(top_k or DEFAULT_TOP_K, len(predictor.spec.class_names))
    # Raises here for a path that doesn't exist, before anything is written.
    listed = [None if path == Path("-") else find_images([path]) for path in paths]  # None: on stdin
    sources = [read_path_list(sys.stdin.buffer) if images is None else iter(images) for images in listed]
    num_listed = sum(len(images) for images in listed if images is not None)
    num_rows = AtLeast(num_listed) if None in listed else num_listed
    say(f"{folder}: {predictor.description}")
    if output_format == "csv":
        print_line(csv_row(["path", "error", *_csv_columns(num_columns)]))
    rows: list[list[str]] = []  # of a table, which is printed at the end
    num_failed = 0
    for path, prediction in _predict_paths(
        predictor, chain.from_iterable(sources), top_k, batch_size, features, num_rows
    ):
        num_failed += isinstance(prediction, PredictError)
        if output_format == "table":
            rows.append(_table_row(str(path), prediction))
        else:
            print_line(_LINES[output_format](str(path), prediction, num_columns))
    if rows:
        _print_table(rows)
    sys.stdout.flush()
    if num_failed:
        nan_rows = f"; their rows in {features} are NaN" if features else ""
        failed = "1 image was" if num_failed == 1 else f"{num_failed} images were"
        say(f"{failed} not predicted, for the reason in the output{nan_rows}")
    return 2 if num_failed else 0


def _predict_paths(
    predictor: Predictor,
    paths: Iterator[Path],
    top_k: int | None,
    batch_size: int,
    features: Path | None,
    num_rows: int,
) -> Iterator[tuple[Path, Prediction | PredictError]]:
    """Yield each path with its prediction, and append its features to the file `features`.

    `num_rows`: the number of paths, or AtLeast those that are known before.
    """
    pending: deque[Path] = deque()  # read by the stream, which reads ahead, and not yet yielded

    def record_paths() -> Iterator[Path]:
        for path in paths:
            pending.append(path)
            yield path

    predictions = predictor.stream(record_paths(), top_k, batch_size, with_features=features is not None)
    if features is None:
        for prediction in predictions:
            yield pending.popleft(), prediction
        return
    shape = shape_of(predictor.spec.model)
    width = shape.num_pooled * shape.width
    with append_rows(features, width, num_rows) as write_row:
        for prediction in predictions:
            row = prediction.features if isinstance(prediction, Prediction) else None
            write_row(np.full(width, np.nan, np.float32) if row is None else row)
            yield pending.popleft(), prediction


@contextmanager
def append_rows(path: Path, width: int, expected_rows: int = AtLeast(0)) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a .npy file [number of rows, `width`] float32 row by row, without holding the rows in memory.

    `expected_rows`: their number, or AtLeast so many, to tell a user how much room they need.
    """
    num_rows = 0

    def header() -> bytes:
        buffer = io.BytesIO()
        fields = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(buffer, fields)
        return buffer.getvalue()

    def num_bytes() -> int:
        least = isinstance(expected_rows, AtLeast)
        size = len(header()) + 4 * width * max(expected_rows, num_rows)
        return AtLeast(size) if least else size

    with write_atomically(path, num_bytes) as temporary, temporary.open("wb") as file:
        initial_header = header()  # NumPy pads it, so that it keeps its length when the number of rows grows

        def write_row(row: np.ndarray) -> None:
            nonlocal num_rows
            file.write(row.astype("<f4").tobytes())
            num_rows += 1

        file.write(initial_header)
        yield write_row
        file.seek(0)
        assert len(header()) == len(initial_header)
        file.write(header())


def _json_line(path: str, prediction: Prediction | PredictError, num_columns: int | None) -> str:
    if isinstance(prediction, PredictError):
        return json_line({**path_fields(path), "error": str(prediction)})
    return json_line({**path_fields(path), "top": prediction.top()})


def _csv_columns(num_classes: int | None) -> list[str]:
    """Return the columns of the classes: three for each, or three for all if their number differs between images."""
    keys = ("class", "name", "probability")
    if num_classes is None:
        return ["classes", "names", "probabilities"]
    return [f"{key}_{rank + 1}" for rank in range(num_classes) for key in keys]


def _csv_line(path: str, prediction: Prediction | PredictError, num_columns: int | None) -> str:
    if isinstance(prediction, PredictError):
        return csv_row([path, str(prediction), *[""] * len(_csv_columns(num_columns))])
    if num_columns is None:
        top = prediction.top()
        # Each name is a cell of its own for a spreadsheet that separates cells by semicolons.
        columns = ([str(csv_cell(entry[key])) for entry in top] for key in ("class", "name", "probability"))
        return csv_row([path, "", *(";".join(column) for column in columns)])
    return csv_row([path, "", *(value for entry in prediction.top() for value in entry.values())])


def _table_row(path: str, prediction: Prediction | PredictError) -> list[str]:
    """Return the cells of an image: its path, then one per class or a single one that says why there is none."""
    if isinstance(prediction, PredictError):
        return [path, str(prediction)]
    names = (escape_within(name, _MAX_NAME_WIDTH) for name in prediction.names)
    classes = [f"{name} {share:.2%}" for name, share in zip(names, prediction.probabilities, strict=True)]
    return [path, *(classes or ["no class"])]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a column for the most likely class, one for the second, and so on."""
    num_cells = max(map(len, rows))
    headers = ["Image", *(f"Class {rank}" for rank in range(1, num_cells))]
    print_table(headers, [[*row, *[""] * (num_cells - len(row))] for row in rows])


_LINES: dict[OutputFormat, Callable[[str, Prediction | PredictError, int | None], str]] = {
    "json": _json_line,
    "csv": _csv_line,
}
