"""Line charts over steps as SVG: axes with round ticks, thinned lines, values in tooltips.

They need no JavaScript. Each chart also contains its data as JSON in a <script type="application/json">, for programs.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from vit_static.report.tables import escape_html

Points = list[tuple[int, float]]  # (step, value), by step

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 470, 40, 204  # of the plot area, in pixels
MAX_TOOLTIPS = 100  # strips of a chart
MAX_DOTS = 150
_MIN_SIZE = 1e-290  # smaller values are 0 on an axis: floats have no exact powers of ten there
NUM_COLOURS = 6  # in STYLE; further series repeat them with dashes

# The palette of Okabe and Ito, which people with colour blindness can distinguish; lighter colours on a dark page.
STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b8860b; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { @media screen {
  :root { --c0: #56b4e9; --c1: #ff8c3b; --c2: #21c795; --c3: #e79ac6; --c4: #f0e442; --c5: #9fb8ff; } } }
.chart { display: inline-block; width: 480px; max-width: 100%; margin: 0 1em 1em 0; vertical-align: top;
  break-inside: avoid; }
.chart svg { width: 100%; height: auto; display: block; overflow: visible; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.chart text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.chart line { stroke: var(--line); stroke-width: 1; }
.chart polyline, .legend polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.chart polyline.raw { stroke-opacity: .35; stroke-width: 1; }
.dashed { stroke-dasharray: 5 3; }
.chart .mark line { stroke: var(--soft); stroke-dasharray: 2 3; }
.chart .mark path { fill: var(--soft); }
.chart .back line { stroke: #d55e00; }
.chart .back path { fill: #d55e00; }
.chart .targets rect { fill: var(--ink); fill-opacity: 0; }
.chart .targets rect:hover { fill-opacity: .1; }
.legend { list-style: none; padding: 0; margin: .5em 0 1em; display: flex; flex-wrap: wrap; gap: .2em 1.5em; }
.legend svg { width: 28px; height: 10px; margin-right: .5em; }
""" + "".join(f".s{n} {{ stroke: var(--c{n}); }} .d{n} {{ fill: var(--c{n}); }}\n" for n in range(NUM_COLOURS))


@dataclass(frozen=True)
class Series:
    """A line of a chart. `number` selects its colour."""

    name: str
    points: Points
    number: int = 0
    dashed: bool = False

    @property
    def css_classes(self) -> str:
        """The classes of its colour and its dashes."""
        is_dashed = self.dashed or self.number // NUM_COLOURS % 2
        return f"s{self.number % NUM_COLOURS}{' dashed' if is_dashed else ''}"


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step at which something happened."""

    step: int
    label: str
    is_rollback: bool = False


@dataclass(frozen=True)
class Axis:
    """A mapping from values to pixels: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    ticks: tuple[float, ...] = ()

    def to_pixels(self, value: float) -> float:
        """Return the coordinate of a value."""
        low, high, value = (math.log10(n) if self.is_log else n for n in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_axis(low: float, high: float, start: float, end: float, max_ticks: int, *, is_rounded: bool) -> Axis:
    """Return an axis with ticks at multiples of 1, 2 or 5 times a power of ten.

    If `is_rounded`, the axis is extended so that it begins and ends with a tick.
    """
    size = max(abs(low), abs(high))
    if size < _MIN_SIZE:
        low, high = -1.0, 1.0
    elif not high - low > 1e-12 * size:  # equal, or too close for ticks that differ
        low, high = low - size * 0.1, high + size * 0.1
    rough = (high - low) / max_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10, 20) if power * factor >= rough * (1 - 1e-9))
    decimals = max(-math.floor(math.log10(step) + 1e-9), 0)
    bounds = low / step, high / step
    if is_rounded:
        first, last = math.floor(bounds[0] + 1e-9), math.ceil(bounds[1] - 1e-9)
    else:
        first, last = math.ceil(bounds[0] - 1e-9), math.floor(bounds[1] + 1e-9)
    ticks = tuple(round(n * step, decimals) for n in range(first, last + 1))
    low, high = (ticks[0], ticks[-1]) if is_rounded else (low, high)
    return Axis(low, high, start, end, ticks=ticks)


def log_axis(low: float, high: float, start: float, end: float) -> Axis:
    """Return a logarithmic axis that begins and ends with a tick.

    Ticks are at powers of ten; for a range of few powers, also at 2 and 5 times them.
    """
    factors = (1,) if high / low > 300 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    all_ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max(bisect.bisect_right(all_ticks, low * (1 + 1e-9)) - 1, 0)
    last = bisect.bisect_left(all_ticks, high * (1 - 1e-9))
    ticks = all_ticks[first : last + 1]
    labelled = ticks[:: -(-len(ticks) // 8)]
    return Axis(ticks[0], ticks[-1], start, end, True, tuple(labelled))


def value_axis(values: Sequence[float], *, may_be_log: bool) -> Axis:
    """Return the vertical axis for `values`.

    It is logarithmic if `may_be_log`, all values are positive, and a linear axis would squeeze most of them to one end.
    """
    low, high = min(values), max(values)
    if may_be_log and low > _MIN_SIZE and high / low >= 100.0 and statistics.median(values) - low < 0.05 * (high - low):
        return log_axis(low, high, BOTTOM, TOP)
    return linear_axis(low, high, BOTTOM, TOP, 5, is_rounded=True)


def step_axis(last_step: int) -> Axis:
    """Return the horizontal axis, from 0 to `last_step`."""
    return linear_axis(0, max(last_step, 1), LEFT, RIGHT, 6, is_rounded=False)


def thin_out(points: Points, axis: Axis) -> Points:
    """Keep the minimum and maximum of each pixel column of a linear axis, and both ends: the line looks the same."""
    if len(points) <= 2 * (axis.end - axis.start):
        return points
    steps, values = np.array(points).T
    columns = (axis.start + (steps - axis.low) / (axis.high - axis.low) * (axis.end - axis.start)).astype(int)
    firsts = np.flatnonzero(np.diff(columns, prepend=-1))
    lasts = np.append(firsts[1:], len(columns)) - 1
    by_value = np.lexsort((values, columns))  # sorted within each column
    indices = np.unique([0, *by_value[firsts], *by_value[lasts], len(points) - 1])
    return [points[index] for index in indices.tolist()]


def running_mean(points: Points) -> Points | None:
    """Return the centred mean over a fortieth of the points; None if the points are few or not noisy."""
    if len(points) < 40:
        return None
    values = np.array([value for _, value in points])
    rises = np.diff(values) > 0.0
    if (rises[1:] != rises[:-1]).sum() < len(points) / 4:
        return None
    sums = np.concatenate([[0.0], np.cumsum(values)])
    half = max(len(points) // 80, 2)
    indices = np.arange(len(points))
    firsts, ends = np.maximum(indices - half, 0), np.minimum(indices + half + 1, len(points))
    means = (sums[ends] - sums[firsts]) / (ends - firsts)
    return [(step, mean) for (step, _), mean in zip(points, means.tolist(), strict=True)]


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


def tick_labels(axis: Axis) -> list[str]:
    """Format the ticks. On a linear axis all get the same number of decimals, or powers of ten if they are small."""
    ticks = axis.ticks
    if axis.is_log:
        return [f"{tick:,g}" if 1e-3 <= tick < 1e5 else _strip_zeros(f"{tick:.4e}") for tick in ticks]
    if max(map(abs, ticks)) < 1e-4:
        return [_strip_zeros(f"{tick:.4e}") if tick else "0" for tick in ticks]
    decimals = max(0, *(-int(Decimal(repr(tick)).normalize().as_tuple().exponent) for tick in ticks))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def chart(
    name: str,
    title: str,
    series: Sequence[Series],
    last_step: int,
    *,
    dots: bool = False,
    smooth: bool = False,
    may_be_log: bool = False,
    marks: Iterable[Mark] = (),
) -> str:
    """Return the HTML of a chart of all series that have points; an empty string if none has.

    The id of the data is curve-NAME. The horizontal axis extends at least to `last_step`, so that the charts of a run
    have the same scale. `dots` marks the points. `smooth` adds a running mean to noisy series. `may_be_log` allows a
    logarithmic vertical axis (see `value_axis`).
    """
    series = [line for line in series if line.points]
    if not series:
        return ""
    x = step_axis(max(last_step, *(line.points[-1][0] for line in series)))
    y = value_axis([value for line in series for _, value in line.points], may_be_log=may_be_log)
    elements: list[str] = []
    series_data: list[dict[str, Any]] = []
    for line in series:
        points, mean = thin_out(line.points, x), running_mean(line.points) if smooth else None
        elements.append(_polyline(points, x, y, f"{line.css_classes}{' raw' if mean else ''}"))
        series_data.append({"name": line.name, "points": _rounded(points)})
        if mean:
            mean = thin_out(mean, x)
            elements.append(_polyline(mean, x, y, f"{line.css_classes} smoothed"))
            series_data[-1]["smoothed"] = _rounded(mean)
        if (dots and len(points) <= MAX_DOTS) or len(points) == 1:
            centres = [f'cx="{x.to_pixels(step):.1f}" cy="{y.to_pixels(value):.1f}"' for step, value in points]
            elements += [f'<circle class="d{line.number % NUM_COLOURS}" {centre} r="2.8"/>' for centre in centres]
    data = {
        "title": title,
        "x": _axis_data(x),
        "y": _axis_data(y),
        "series": series_data,
        "marks": [[mark.step, mark.label] for mark in marks],
    }
    summary = "; ".join(f"{line.name + ': ' if len(series) > 1 else ''}{_summary(line.points)}" for line in series)
    last_value = _point(series[0].points[-1]) if len(series) == 1 else ""
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape_html(f"{title}, by step: {summary}")}">'
        f'<text class="title" x="{LEFT}" y="14">{escape_html(title)}</text>'
        f'<text x="{RIGHT}" y="14" text-anchor="end">{last_value}</text>'
        f"{_grid(x, y)}{''.join(_mark(mark, x) for mark in marks)}{''.join(elements)}{_tooltips(series, x)}</svg>"
        f'<script type="application/json" id="curve-{name}">{as_json(data)}</script></figure>'
    )


def legend(series: Sequence[Series]) -> str:
    """Return the HTML of a legend with the names of the series."""
    items = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true">'
        f'<polyline class="{line.css_classes}" points="0,5 28,5"/></svg>{escape_html(line.name)}</li>'
        for line in series
    )
    return f'<ul class="legend">{items}</ul>'


def as_json(data: Any) -> str:
    """Encode data as JSON that is safe inside an HTML script element, whatever texts it contains."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rounded(points: Points) -> list[list[float]]:
    """Round the values to the digits of float32."""
    return [[step, float(f"{value:.7g}")] for step, value in points]


def _axis_data(axis: Axis) -> dict[str, Any]:
    return {"low": axis.low, "high": axis.high, "start": axis.start, "end": axis.end, "log": axis.is_log}


def _polyline(points: Points, x: Axis, y: Axis, css_classes: str) -> str:
    coordinates = " ".join(f"{x.to_pixels(step):.1f},{y.to_pixels(value):.1f}" for step, value in points)
    return f'<polyline class="{css_classes}" points="{coordinates}"/>'


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for tick, label in zip(y.ticks, tick_labels(y), strict=True):
        top = f"{y.to_pixels(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{top}" y2="{top}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{top}" dy="4" text-anchor="end">{label}</text>')
    for tick, label in zip(x.ticks, tick_labels(x), strict=True):
        left = f"{x.to_pixels(tick):.1f}"
        parts.append(f'<line x1="{left}" x2="{left}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text class="x" x="{left}" y="{BOTTOM + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{LEFT - 14}" y="{BOTTOM + 17}" text-anchor="end">step</text>')
    return "".join(parts)


def _mark(mark: Mark, x: Axis) -> str:
    left = x.to_pixels(mark.step)
    return (
        f'<g class="mark{" back" if mark.is_rollback else ""}">'
        f"<title>{escape_html(mark.label)} at step {mark.step:,}</title>"
        f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{TOP - 6}" y2="{BOTTOM}"/>'
        f'<path d="M{left - 5:.1f} {TOP - 14}h10l-5 8z"/></g>'
    )


def _tooltips(series: Sequence[Series], x: Axis) -> str:
    """Return transparent strips whose tooltips show the values nearest to their middle."""
    steps = sorted({step for line in series for step, _ in line.points})
    strip_steps = steps[:: -(-len(steps) // MAX_TOOLTIPS)]
    if strip_steps[-1] != steps[-1]:
        strip_steps.append(steps[-1])
    middles = [x.to_pixels(step) for step in strip_steps]
    bounds = [LEFT, *((before + after) / 2 for before, after in itertools.pairwise(middles)), RIGHT]
    line_steps = [[step for step, _ in line.points] for line in series]
    rects = []
    for strip_step, (left, right) in zip(strip_steps, itertools.pairwise(bounds), strict=True):
        texts = []
        for line, steps in zip(series, line_steps, strict=True):
            index = min(bisect.bisect_left(steps, strip_step), len(steps) - 1)
            if index and abs(steps[index - 1] - strip_step) < abs(steps[index] - strip_step):
                index -= 1
            step, value = line.points[index]
            name = f"{line.name}, " if len(series) > 1 else ""
            texts.append(f"{name}step {step:,}: {format_number(value)}")
        rects.append(
            f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{BOTTOM - TOP}">'
            f"<title>{chr(10).join(map(escape_html, texts))}</title></rect>"
        )
    return f'<g class="targets">{"".join(rects)}</g>'


def _summary(points: Points) -> str:
    """Describe a line in words, for screen readers."""
    low = min(points, key=lambda point: point[1])
    high = max(points, key=lambda point: point[1])
    return f"{_point(points[0])}, {_point(points[-1])}; minimum {_point(low)}, maximum {_point(high)}"


def _point(point: tuple[int, float]) -> str:
    step, value = point
    return f"{format_number(value)} at step {step:,}"
