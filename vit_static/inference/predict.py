"""The predict verb: predictions as JSON, CSV or a table."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vit_static.common.errors import PredictError
from vit_static.common.io import write_atomically
from vit_static.common.text import say
from vit_static.config.schema import InferencePrecision
from vit_static.inference.image_io import find_images, listed_on
from vit_static.inference.predictor import Prediction, Predictor, load_predictor
from vit_static.model.variants import shape_of

OutputFormat = Literal["json", "csv", "table"]
_MAX_NAME_LENGTH = 24  # in the table


def predict_images(
    folder: Path,
    paths: Sequence[Path],
    top_k: int,
    batch_size: int,
    output_format: OutputFormat = "json",
    features: Path | None = None,
    precision: InferencePrecision | None = None,
) -> int:
    """The verb: a line an image on stdout; `-` among the paths stands for a list of paths on stdin.

    An image that can't be read gets a line that says why, and exit code 2 at the end; the others are still done.
    `features`: a .npy file to write, [number of lines, width] float32, whose rows are NaN where the line has an error.
    """
    if top_k < 1 or batch_size < 1:
        raise PredictError("--top-k and --batch-size must be at least 1")
    predictor = load_predictor(folder, precision=precision)
    top_k = min(top_k, len(predictor.card.class_names))
    given = [listed_on(sys.stdin.buffer) if path == Path("-") else iter(find_images([path])) for path in paths]
    say(f"{folder}: {predictor.description}")
    # A path that is no UTF-8 has a surrogate; in JSON it is then its escape, too.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if output_format == "csv":
        print(
            _csv_row(
                "path", "error", *(f"{key}_{k + 1}" for k in range(top_k) for key in ("class", "name", "probability"))
            )
        )
    to_line = _LINES[output_format]
    columns = _Columns(top_k, min(max(map(len, predictor.card.class_names)), _MAX_NAME_LENGTH))
    num_failed = 0
    for path, prediction in _predicted(predictor, chain.from_iterable(given), top_k, batch_size, features):
        num_failed += isinstance(prediction, PredictError)
        print(to_line(str(path), prediction, columns))
    sys.stdout.flush()
    if num_failed:
        nan = f", their rows in {features} are NaN" if features else ""
        say(f"{num_failed} images have no classes; their lines say why{nan}")
    return 2 if num_failed else 0


def _predicted(
    predictor: Predictor, paths: Iterator[Path], top_k: int, batch_size: int, features: Path | None
) -> Iterator[tuple[Path, Prediction | PredictError]]:
    """Each path and what is found of it; writes the features beside, a row each."""
    seen: deque[Path] = deque()

    def remembered() -> Iterator[Path]:
        for path in paths:
            seen.append(path)
            yield path

    found = predictor.stream(remembered(), top_k, batch_size, with_features=features is not None)
    if features is None:
        for prediction in found:
            yield seen.popleft(), prediction
        return
    shape = shape_of(predictor.card.model)
    width = shape.num_pooled * shape.width
    with append_rows(features, width) as write_row:
        for prediction in found:
            own = prediction.features if isinstance(prediction, Prediction) else None
            write_row(np.full(width, np.nan, np.float32) if own is None else own)
            yield seen.popleft(), prediction


@contextmanager
def append_rows(path: Path, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A .npy file [number of rows, `width`] float32, written a row at a time: none of it is held in memory."""
    num_rows = 0

    def header() -> bytes:
        written = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(written, shape)
        return written.getvalue()

    with write_atomically(path) as temporary, temporary.open("wb") as file:
        begin = header()  # NumPy leaves room in it for the first axis to grow

        def write_row(row: np.ndarray) -> None:
            nonlocal num_rows
            file.write(row.astype("<f4").tobytes())
            num_rows += 1

        file.write(begin)
        yield write_row
        file.seek(0)
        assert len(header()) == len(begin)
        file.write(header())


class _Columns(NamedTuple):
    """What the lines of a run have in common: classes an image, and the characters of a name in the table."""

    top_k: int
    name_width: int


def _json_line(path: str, found: Prediction | PredictError, columns: _Columns) -> str:
    if isinstance(found, PredictError):
        return json.dumps({"path": path, "error": str(found)}, ensure_ascii=False)
    return json.dumps({"path": path, "top": found.top()}, ensure_ascii=False)


def _csv_line(path: str, found: Prediction | PredictError, columns: _Columns) -> str:
    if isinstance(found, PredictError):
        return _csv_row(path, str(found), *[""] * (3 * columns.top_k))
    return _csv_row(path, "", *(value for entry in found.top() for value in entry.values()))


def _csv_row(*values: object) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="").writerow(values)
    return written.getvalue()


def _table_line(path: str, found: Prediction | PredictError, columns: _Columns) -> str:
    if isinstance(found, PredictError):
        return f"{'':7}  {found}"
    width = columns.name_width
    classes = [
        f"{share:7.2%}  {name if len(name) <= width else name[: width - 1] + '…':{width}}"
        for name, share in zip(found.names, found.probabilities, strict=True)
    ]
    return "  ".join([*classes, path])


_LINES: dict[OutputFormat, Callable[[str, Prediction | PredictError, _Columns], str]] = {
    "json": _json_line,
    "csv": _csv_line,
    "table": _table_line,
}
