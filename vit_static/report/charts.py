"""Data and HTML of the report's line charts, which templates/charts.js draws with Bokeh.

Each chart contains its data as JSON in a <script type="application/json">, for that script and for other programs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_static.report.tables import escape_html

Points = list[tuple[int, float]]  # (step, value), by step

MAX_COLUMNS = 800  # of a long line, of which the minimum and the maximum are kept
NUM_COLOURS = 6  # --c0 to --c5 in templates/style.css.j2; further lines repeat them with dashes


@dataclass(frozen=True)
class Line:
    """A line of a chart. `run` is the index of its run, whose timeline has its epochs and times; `number` selects its
    colour and, if the lines have toggles, the one that shows it."""

    name: str
    points: Points
    run: int = 0
    number: int = 0
    is_dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step at which something happened."""

    step: int
    label: str
    is_rollback: bool = False


def thin_out(points: Points) -> tuple[Points, list[float] | None]:
    """Return the points that show a long line as it is, and the mean of its neighbourhood for each.

    A line of more than 2 * MAX_COLUMNS points is cut into MAX_COLUMNS columns of equal width, of which the minimum and
    the maximum are kept, and both ends of the line. The means are those of the columns; None if all points are kept.
    """
    if len(points) <= 2 * MAX_COLUMNS:
        return points, None
    steps, values = np.array(points).T
    columns = ((steps - steps[0]) * (MAX_COLUMNS / (steps[-1] - steps[0]))).astype(int).clip(max=MAX_COLUMNS - 1)
    firsts = np.flatnonzero(np.diff(columns, prepend=-1))
    ends = np.append(firsts[1:], len(columns))
    by_value = np.lexsort((values, columns))  # sorted within each column
    indices = np.unique([0, *by_value[firsts], *by_value[ends - 1], len(points) - 1])
    means = np.repeat(np.add.reduceat(values, firsts) / (ends - firsts), ends - firsts)
    return [points[index] for index in indices.tolist()], means[indices].tolist()


def format_number(value: float) -> str:
    """Format a number with four significant digits, an integer or a large number with all digits before the point."""
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= size < 1e6:
        return f"{value:,.{max(3 - math.floor(math.log10(size)), 0)}f}"
    return _strip_zeros(f"{value:.3e}")


def _strip_zeros(text: str) -> str:
    """Shorten 1.500e-04 to 1.5e-4."""
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    dots: bool = False,
    smooth: bool = False,
    may_be_log: bool = False,
    marks: Iterable[Mark] = (),
    has_toggles: bool = True,
) -> str:
    """Return the HTML of a chart of all lines that have points; an empty string if none has.

    The id of the data is curve-NAME. `dots` marks the points. `smooth` lets the page's slider smooth the lines.
    `may_be_log` allows a logarithmic vertical axis. Without toggles the chart has a legend of its own.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    data = {
        "title": title,
        "dots": dots,
        "smooth": smooth,
        "log": may_be_log,
        "toggles": has_toggles,
        "lines": [_line_data(line) for line in lines],
        "marks": [[mark.step, mark.label, mark.is_rollback] for mark in marks],
    }
    summary = "; ".join(f"{line.name + ': ' if len(lines) > 1 else ''}{_summary(line.points)}" for line in lines)
    return figure(f"curve-{name}", title, f"{title}, by step: {summary}", data)


def figure(data_id: str, title: str, description: str, data: dict[str, Any]) -> str:
    """Return the HTML of a chart that templates/charts.js draws from `data`. `description` is for screen readers."""
    return (
        f'<figure class="chart" role="img" aria-label="{escape_html(description)}">'
        f'<figcaption>{escape_html(title)}</figcaption><div class="plot"></div>'
        f'<script type="application/json" id="{data_id}">{as_json(data)}</script></figure>'
    )


def as_json(data: Any) -> str:
    """Encode data as JSON that is safe inside an HTML script element, whatever texts it contains."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def round_to_float32(values: Iterable[float]) -> list[float]:
    """Round the values to the digits of float32."""
    return [float(f"{value:.7g}") for value in values]


def _line_data(line: Line) -> dict[str, Any]:
    points, means = thin_out(line.points)
    return {
        "name": line.name,
        "run": line.run,
        "number": line.number,
        "dashed": line.is_dashed or line.number // NUM_COLOURS % 2 == 1,
        "steps": [step for step, _ in points],
        "values": round_to_float32(value for _, value in points),
        "means": None if means is None else round_to_float32(means),
    }


def _summary(points: Points) -> str:
    """Describe a line in words, for screen readers."""
    low = min(points, key=lambda point: point[1])
    high = max(points, key=lambda point: point[1])
    return f"{_point(points[0])}, {_point(points[-1])}; minimum {_point(low)}, maximum {_point(high)}"


def _point(point: tuple[int, float]) -> str:
    step, value = point
    return f"{format_number(value)} at step {step:,}"
